package devices

import (
	"os"
	"testing"

	"github.com/skerry-io/skerry/cloudhub/controlplane/planetest"
)

func TestMain(m *testing.M) { os.Exit(planetest.Main(m)) }
