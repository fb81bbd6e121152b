package planetest

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
)

// Kubectl runs the real kubectl in this process, as administrator, and returns
// what it prints. failed is what it says before it would exit with an error.
// It must not run concurrently: how kubectl fails is set for the process.
func (p *Plane) Kubectl(t testing.TB, args ...string) (out, failed string) {
	t.Helper()
	type fatal struct{ message string }
	util.BehaviorOnFatal(func(message string, _ int) { panic(fatal{message}) })
	defer util.DefaultBehaviorOnFatal()
	defer func() {
		switch r := recover().(type) {
		case nil:
		case fatal:
			failed = strings.TrimSpace(r.message)
		default:
			panic(r)
		}
	}()
	var stdout, stderr bytes.Buffer
	defer func() { out = stdout.String() }()
	streams := genericiooptions.IOStreams{In: os.Stdin, Out: &stdout, ErrOut: &stderr}
	flags := genericclioptions.NewConfigFlags(true)
	*flags.KubeConfig = p.AdminKubeconfigPath()
	*flags.CacheDir = t.TempDir()
	c := cmd.NewKubectlCommand(cmd.KubectlOptions{Arguments: append([]string{"kubectl"}, args...), ConfigFlags: flags, IOStreams: streams})
	c.SetArgs(args)
	c.SetOut(&stdout)
	c.SetErr(&stderr)
	c.SilenceErrors, c.SilenceUsage = true, true
	if err := c.ExecuteContext(t.Context()); err != nil {
		return "", err.Error()
	}
	if stderr.Len() > 0 {
		t.Logf("kubectl %s: %s", strings.Join(args, " "), strings.TrimSpace(stderr.String()))
	}
	return "", ""
}
