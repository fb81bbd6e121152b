package host

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestCollectShowsTheLatestSample(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(s)
	const nothingYet = `
# HELP skerry_host_sample_failures_total Parts of samples that could not be measured.
# TYPE skerry_host_sample_failures_total counter
skerry_host_sample_failures_total 0
`
	if err := testutil.GatherAndCompare(r, strings.NewReader(nothingYet)); err != nil {
		t.Error(err)
	}
	s.latest.Store(&Sample{
		Time:        time.UnixMilli(1_800_000_000_500),
		Took:        2 * time.Millisecond,
		BootTime:    time.Unix(1_700_000_000, 0),
		CPU:         CPU{Cores: 4, User: 1, Idle: 2.5},
		Memory:      Memory{Total: 1 << 30},
		FileSystems: []FileSystem{{Device: "/dev/mmcblk0p2", Mountpoint: "/", Type: "ext4", ReadOnly: true, Size: 8e9, Available: 1e9}},
		Disks:       []Disk{{Device: "mmcblk0", ReadBytes: 10, WrittenBytes: 20, Busy: time.Second}},
		Interfaces:  []Interface{{Name: "eth0", ReceivedBytes: 7, SentBytes: 8, ReceiveErrors: 1}},
		Sensors:     []Sensor{{Name: "cpu_thermal", Temperature: 48.5}},
	})
	const want = `
# HELP skerry_host_boot_time_seconds When the host booted, as a unix time.
# TYPE skerry_host_boot_time_seconds gauge
skerry_host_boot_time_seconds 1.7e+09
# HELP skerry_host_cpu_cores Logical processors online.
# TYPE skerry_host_cpu_cores gauge
skerry_host_cpu_cores 4
# HELP skerry_host_disk_written_bytes_total Bytes written to a block device.
# TYPE skerry_host_disk_written_bytes_total counter
skerry_host_disk_written_bytes_total{device="mmcblk0"} 20
# HELP skerry_host_filesystem_readonly Whether a local file system is mounted read-only.
# TYPE skerry_host_filesystem_readonly gauge
skerry_host_filesystem_readonly{device="/dev/mmcblk0p2",fstype="ext4",mountpoint="/"} 1
# HELP skerry_host_network_receive_bytes_total Bytes received by an interface.
# TYPE skerry_host_network_receive_bytes_total counter
skerry_host_network_receive_bytes_total{interface="eth0"} 7
# HELP skerry_host_sample_timestamp_seconds When the host was last measured, as a unix time.
# TYPE skerry_host_sample_timestamp_seconds gauge
skerry_host_sample_timestamp_seconds 1.8000000005e+09
# HELP skerry_host_temperature_celsius Temperature of a sensor.
# TYPE skerry_host_temperature_celsius gauge
skerry_host_temperature_celsius{sensor="cpu_thermal"} 48.5
`
	if err := testutil.GatherAndCompare(r, strings.NewReader(want),
		"skerry_host_boot_time_seconds", "skerry_host_cpu_cores", "skerry_host_disk_written_bytes_total",
		"skerry_host_filesystem_readonly", "skerry_host_network_receive_bytes_total",
		"skerry_host_sample_timestamp_seconds", "skerry_host_temperature_celsius"); err != nil {
		t.Error(err)
	}
	problems, err := testutil.GatherAndLint(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("metric %s: %s", p.Metric, p.Text)
	}
}

func TestNewRefusesACostlyPeriod(t *testing.T) {
	if _, err := New(Config{Period: 10 * time.Millisecond}); err == nil {
		t.Error("a period of 10 ms was accepted")
	}
}
