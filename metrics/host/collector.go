package host

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/skerry-io/skerry/metrics"
)

// The exposed names. A scrape shows the latest sample and its time; nothing is
// measured for it.
var (
	descSampled  = desc("sample_timestamp_seconds", "When the host was last measured, as a unix time.")
	descTook     = desc("sample_duration_seconds", "How long the last measurement took.")
	descFailed   = desc("sample_failures_total", "Parts of samples that could not be measured.")
	descBoot     = desc("boot_time_seconds", "When the host booted, as a unix time.")
	descCores    = desc("cpu_cores", "Logical processors online.")
	descCPU      = desc("cpu_seconds_total", "Time all processors spent, by mode.", "mode")
	descLoad     = desc("load_average", "The kernel's load average, by minutes.", "minutes")
	descMemory   = desc("memory_bytes", "Memory of the host, by kind.", "kind")
	descFSSize   = desc("filesystem_size_bytes", "Size of a local file system.", "device", "mountpoint", "fstype")
	descFSAvail  = desc("filesystem_available_bytes", "Space left to users other than root.", "device", "mountpoint", "fstype")
	descFSInodes = desc("filesystem_inodes", "Inodes of a local file system.", "device", "mountpoint", "fstype")
	descFSIFree  = desc("filesystem_inodes_free", "Inodes not in use.", "device", "mountpoint", "fstype")
	descFSRO     = desc("filesystem_readonly", "Whether a local file system is mounted read-only.", "device", "mountpoint", "fstype")
	descDiskRead = desc("disk_read_bytes_total", "Bytes read from a block device.", "device")
	descDiskWrit = desc("disk_written_bytes_total", "Bytes written to a block device.", "device")
	descDiskBusy = desc("disk_busy_seconds_total", "Time a block device was busy.", "device")
	descNetRecv  = desc("network_receive_bytes_total", "Bytes received by an interface.", "interface")
	descNetSent  = desc("network_transmit_bytes_total", "Bytes sent by an interface.", "interface")
	descNetErrs  = desc("network_errors_total", "Errors of an interface, by direction.", "interface", "direction")
	descNetDrops = desc("network_drops_total", "Packets an interface dropped, by direction.", "interface", "direction")
	descTemp     = desc("temperature_celsius", "Temperature of a sensor.", "sensor")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, "host", name), help, labels, nil)
}

// Describe sends nothing: which series there are depends on the host.
func (s *Sampler) Describe(chan<- *prometheus.Desc) {}

// Collect shows the latest sample.
func (s *Sampler) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	counter(descFailed, float64(s.failed.Load()))
	p := s.latest.Load()
	if p == nil {
		return
	}
	gauge(descSampled, float64(p.Time.UnixMilli())/1000)
	gauge(descTook, p.Took.Seconds())
	gauge(descBoot, float64(p.BootTime.Unix()))
	gauge(descCores, float64(p.CPU.Cores))
	for mode, v := range map[string]float64{
		"user": p.CPU.User, "nice": p.CPU.Nice, "system": p.CPU.System, "idle": p.CPU.Idle,
		"iowait": p.CPU.IOWait, "irq": p.CPU.IRQ, "softirq": p.CPU.SoftIRQ, "steal": p.CPU.Steal,
	} {
		counter(descCPU, v, mode)
	}
	gauge(descLoad, p.Load.One, "1")
	gauge(descLoad, p.Load.Five, "5")
	gauge(descLoad, p.Load.Fifteen, "15")
	for kind, v := range map[string]uint64{
		"total": p.Memory.Total, "available": p.Memory.Available, "free": p.Memory.Free, "buffers": p.Memory.Buffers,
		"cached": p.Memory.Cached, "swap_total": p.Memory.SwapTotal, "swap_free": p.Memory.SwapFree,
	} {
		gauge(descMemory, float64(v), kind)
	}
	for _, f := range p.FileSystems {
		gauge(descFSSize, float64(f.Size), f.Device, f.Mountpoint, f.Type)
		gauge(descFSAvail, float64(f.Available), f.Device, f.Mountpoint, f.Type)
		gauge(descFSInodes, float64(f.Inodes), f.Device, f.Mountpoint, f.Type)
		gauge(descFSIFree, float64(f.InodesFree), f.Device, f.Mountpoint, f.Type)
		ro := 0.0
		if f.ReadOnly {
			ro = 1
		}
		gauge(descFSRO, ro, f.Device, f.Mountpoint, f.Type)
	}
	for _, d := range p.Disks {
		counter(descDiskRead, float64(d.ReadBytes), d.Device)
		counter(descDiskWrit, float64(d.WrittenBytes), d.Device)
		counter(descDiskBusy, d.Busy.Seconds(), d.Device)
	}
	for _, i := range p.Interfaces {
		counter(descNetRecv, float64(i.ReceivedBytes), i.Name)
		counter(descNetSent, float64(i.SentBytes), i.Name)
		counter(descNetErrs, float64(i.ReceiveErrors), i.Name, "receive")
		counter(descNetErrs, float64(i.SendErrors), i.Name, "transmit")
		counter(descNetDrops, float64(i.ReceiveDrops), i.Name, "receive")
		counter(descNetDrops, float64(i.SendDrops), i.Name, "transmit")
	}
	for _, t := range p.Sensors {
		gauge(descTemp, t.Temperature, t.Name)
	}
}
