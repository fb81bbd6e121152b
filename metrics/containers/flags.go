package containers

import (
	"flag"
	"fmt"
)

// setFlag overrides a setting that cAdvisor offers only as a flag of the
// process. The flags are part of the pinned cAdvisor version, so a missing one
// is a broken build, not a condition to handle.
func setFlag(name, value string) {
	f := flag.Lookup(name)
	if f == nil {
		panic(fmt.Sprintf("metrics: cAdvisor has no flag %q", name))
	}
	if err := f.Value.Set(value); err != nil {
		panic(fmt.Sprintf("metrics: set cAdvisor's flag %q to %q: %v", name, value, err))
	}
	f.DefValue = value
}
