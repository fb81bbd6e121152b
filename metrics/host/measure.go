package host

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/shirou/gopsutil/v3/cpu"
	"github.com/shirou/gopsutil/v3/disk"
	gopshost "github.com/shirou/gopsutil/v3/host"
	"github.com/shirou/gopsutil/v3/load"
	"github.com/shirou/gopsutil/v3/mem"
	gopsnet "github.com/shirou/gopsutil/v3/net"
)

// maxOfEach bounds file systems, disks, interfaces and sensors, so that a host
// with hundreds of them cannot swell a sample or the time series made of it.
const maxOfEach = 32

func (s *Sampler) measure(ctx context.Context) Sample {
	started := time.Now()
	sample := Sample{Time: started}
	s.cpu(ctx, &sample.CPU)
	s.memory(ctx, &sample.Memory)
	s.load(ctx, &sample.Load)
	s.uptime(ctx, &sample)
	sample.FileSystems = s.fileSystems(ctx)
	sample.Disks = s.disks(ctx)
	sample.Interfaces = s.interfaces(ctx)
	sample.Sensors = s.sensors(ctx)
	sample.Took = time.Since(started)
	return sample
}

func (s *Sampler) cpu(ctx context.Context, c *CPU) {
	times, err := cpu.TimesWithContext(ctx, false)
	if s.note("cpu", err); err != nil || len(times) == 0 {
		return
	}
	t := times[0]
	*c = CPU{User: t.User, Nice: t.Nice, System: t.System, Idle: t.Idle, IOWait: t.Iowait, IRQ: t.Irq, SoftIRQ: t.Softirq, Steal: t.Steal}
	c.Cores, err = cpu.CountsWithContext(ctx, true)
	s.note("cpu count", err)
	if total := c.all() - s.previous.all(); s.previous.all() > 0 && total > 0 {
		// Idle time may run backwards by a tick on some kernels.
		c.Used = min(max((c.busy()-s.previous.busy())/total, 0), 1)
	}
	s.previous = *c
}

func (s *Sampler) memory(ctx context.Context, m *Memory) {
	v, err := mem.VirtualMemoryWithContext(ctx)
	if s.note("memory", err); err != nil {
		return
	}
	*m = Memory{
		Total: v.Total, Available: v.Available, Free: v.Free, Buffers: v.Buffers, Cached: v.Cached,
		SwapTotal: v.SwapTotal, SwapFree: v.SwapFree,
	}
}

func (s *Sampler) load(ctx context.Context, l *Load) {
	avg, err := load.AvgWithContext(ctx)
	if s.note("load", err); err != nil {
		return
	}
	*l = Load{One: avg.Load1, Five: avg.Load5, Fifteen: avg.Load15}
}

func (s *Sampler) uptime(ctx context.Context, sample *Sample) {
	up, err := gopshost.UptimeWithContext(ctx)
	if s.note("uptime", err); err != nil {
		return
	}
	sample.Uptime = time.Duration(up) * time.Second
	sample.BootTime = sample.Time.Add(-sample.Uptime).Truncate(time.Second)
}

// fileSystems asks each local device once, at its shortest mountpoint: a node
// mounts the same device again for many a volume.
func (s *Sampler) fileSystems(ctx context.Context) []FileSystem {
	parts, err := disk.PartitionsWithContext(ctx, false) // file systems on devices only
	if s.note("file systems", err); err != nil {
		return nil
	}
	slices.SortStableFunc(parts, func(a, b disk.PartitionStat) int {
		return cmp.Or(cmp.Compare(len(a.Mountpoint), len(b.Mountpoint)), cmp.Compare(a.Mountpoint, b.Mountpoint))
	})
	seen := make(map[string]bool)
	var all []FileSystem
	for _, p := range parts {
		if seen[p.Device] || len(all) == maxOfEach || !localDevice(p) {
			continue
		}
		u, err := disk.UsageWithContext(ctx, p.Mountpoint)
		if err != nil {
			continue // unmounted meanwhile
		}
		seen[p.Device] = true
		all = append(all, FileSystem{
			Device: p.Device, Mountpoint: p.Mountpoint, Type: p.Fstype, ReadOnly: slices.Contains(p.Opts, "ro"),
			Size: u.Total, Available: u.Free, Used: u.Used, Inodes: u.InodesTotal, InodesFree: u.InodesFree,
		})
	}
	return all
}

// localDevice leaves out images mounted read-only through a loop device, whose
// fill level is always 100 %.
func localDevice(p disk.PartitionStat) bool {
	return strings.HasPrefix(p.Device, "/dev/") && p.Fstype != "squashfs" && p.Fstype != "iso9660"
}

func (s *Sampler) disks(ctx context.Context) []Disk {
	counters, err := disk.IOCountersWithContext(ctx)
	if s.note("disks", err); err != nil {
		return nil
	}
	var all []Disk
	for name, c := range counters {
		if strings.HasPrefix(name, "loop") || strings.HasPrefix(name, "ram") {
			continue
		}
		all = append(all, Disk{
			Device: name, Reads: c.ReadCount, ReadBytes: c.ReadBytes, Writes: c.WriteCount, WrittenBytes: c.WriteBytes,
			Busy: time.Duration(c.IoTime) * time.Millisecond,
		})
	}
	return bounded(all, func(d Disk) string { return d.Device })
}

// interfaces leaves out those that come and go with pods: a time series per
// pod sandbox would never end.
func (s *Sampler) interfaces(ctx context.Context) []Interface {
	counters, err := gopsnet.IOCountersWithContext(ctx, true)
	if s.note("interfaces", err); err != nil {
		return nil
	}
	var all []Interface
	for _, c := range counters {
		if strings.HasPrefix(c.Name, "veth") || strings.HasPrefix(c.Name, "cali") || strings.HasPrefix(c.Name, "lxc") {
			continue
		}
		all = append(all, Interface{
			Name:          c.Name,
			ReceivedBytes: c.BytesRecv, ReceivedPackets: c.PacketsRecv, ReceiveErrors: c.Errin, ReceiveDrops: c.Dropin,
			SentBytes: c.BytesSent, SentPackets: c.PacketsSent, SendErrors: c.Errout, SendDrops: c.Dropout,
		})
	}
	return bounded(all, func(i Interface) string { return i.Name })
}

// sensors takes what can be read: gopsutil reports the sensors that fail
// beside those that do not, and many machines have none.
func (s *Sampler) sensors(ctx context.Context) []Sensor {
	temps, _ := gopshost.SensorsTemperaturesWithContext(ctx)
	var all []Sensor
	for _, t := range temps {
		all = append(all, Sensor{Name: t.SensorKey, Temperature: t.Temperature, High: t.High, Critical: t.Critical})
	}
	all = bounded(all, func(s Sensor) string { return s.Name })
	return slices.CompactFunc(all, func(a, b Sensor) bool { return a.Name == b.Name })
}

// bounded sorts by name and keeps the first maxOfEach, the same ones each time.
func bounded[T any](all []T, name func(T) string) []T {
	slices.SortStableFunc(all, func(a, b T) int { return cmp.Compare(name(a), name(b)) })
	return all[:min(len(all), maxOfEach)]
}
