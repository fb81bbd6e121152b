package seglog

import (
	"os"
	"syscall"
)

// datasync brings what was written to f to the disk, and what it takes to read
// it back, but not its times.
func datasync(f *os.File) error {
	for {
		if err := syscall.Fdatasync(int(f.Fd())); err != syscall.EINTR {
			return err
		}
	}
}
