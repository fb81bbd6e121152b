package host

import "time"

// Sample is the machine at one moment. Totals count since boot.
type Sample struct {
	Time        time.Time     `json:"time"`
	Took        time.Duration `json:"took"` // to measure all this
	BootTime    time.Time     `json:"bootTime"`
	Uptime      time.Duration `json:"uptime"`
	CPU         CPU           `json:"cpu"`
	Memory      Memory        `json:"memory"`
	Load        Load          `json:"load"`
	FileSystems []FileSystem  `json:"fileSystems"`
	Disks       []Disk        `json:"disks"`
	Interfaces  []Interface   `json:"interfaces"`
	Sensors     []Sensor      `json:"sensors"`
}

// CPU is the time all processors spent, in seconds.
type CPU struct {
	Cores   int     `json:"cores"` // online, logical
	User    float64 `json:"user"`
	Nice    float64 `json:"nice"`
	System  float64 `json:"system"`
	Idle    float64 `json:"idle"`
	IOWait  float64 `json:"ioWait"`
	IRQ     float64 `json:"irq"`
	SoftIRQ float64 `json:"softIRQ"`
	Steal   float64 `json:"steal"`
	// Used is the share of all processors' time that was neither idle nor
	// waiting since the sample before, 0 to 1; zero in the first sample.
	Used float64 `json:"used"`
}

func (c CPU) busy() float64 { return c.User + c.Nice + c.System + c.IRQ + c.SoftIRQ + c.Steal }
func (c CPU) all() float64  { return c.busy() + c.Idle + c.IOWait }

// Memory is in bytes.
type Memory struct {
	Total     uint64 `json:"total"`
	Available uint64 `json:"available"` // the kernel's estimate for new work
	Free      uint64 `json:"free"`
	Buffers   uint64 `json:"buffers"`
	Cached    uint64 `json:"cached"`
	SwapTotal uint64 `json:"swapTotal"`
	SwapFree  uint64 `json:"swapFree"`
}

// Load is the kernel's load averages over 1, 5 and 15 minutes.
type Load struct {
	One     float64 `json:"one"`
	Five    float64 `json:"five"`
	Fifteen float64 `json:"fifteen"`
}

// FileSystem is one file system on a local device, in bytes and inodes.
type FileSystem struct {
	Device     string `json:"device"`
	Mountpoint string `json:"mountpoint"`
	Type       string `json:"type"`
	ReadOnly   bool   `json:"readOnly"`
	Size       uint64 `json:"size"`
	Available  uint64 `json:"available"` // to a user that is not root
	Used       uint64 `json:"used"`
	Inodes     uint64 `json:"inodes"`
	InodesFree uint64 `json:"inodesFree"`
}

// Disk is what a block device did.
type Disk struct {
	Device       string        `json:"device"`
	Reads        uint64        `json:"reads"`
	ReadBytes    uint64        `json:"readBytes"`
	Writes       uint64        `json:"writes"`
	WrittenBytes uint64        `json:"writtenBytes"`
	Busy         time.Duration `json:"busy"`
}

// Interface is what a network interface carried.
type Interface struct {
	Name            string `json:"name"`
	ReceivedBytes   uint64 `json:"receivedBytes"`
	ReceivedPackets uint64 `json:"receivedPackets"`
	ReceiveErrors   uint64 `json:"receiveErrors"`
	ReceiveDrops    uint64 `json:"receiveDrops"`
	SentBytes       uint64 `json:"sentBytes"`
	SentPackets     uint64 `json:"sentPackets"`
	SendErrors      uint64 `json:"sendErrors"`
	SendDrops       uint64 `json:"sendDrops"`
}

// Sensor is one temperature in degrees Celsius; High and Critical are zero
// where the sensor does not say.
type Sensor struct {
	Name        string  `json:"name"`
	Temperature float64 `json:"temperature"`
	High        float64 `json:"high"`
	Critical    float64 `json:"critical"`
}
