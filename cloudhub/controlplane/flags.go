package controlplane

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	kcm "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	kcmoptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	scheduleroptions "k8s.io/kubernetes/cmd/kube-scheduler/app/options"
)

// ownFlags are set from Config; a second opinion would split the plane.
var ownFlags = map[string]string{
	"bind-address":             "the API server's listen address",
	"secure-port":              "the API server's listen address",
	"advertise-address":        "the advertise address",
	"etcd-servers":             "the external etcd endpoints",
	"service-cluster-ip-range": "the service CIDR",
	"leader-elect":             "nothing: losing an election would end the whole process",
	"kubeconfig":               "nothing: the plane's own identities are used",
}

// sharedFlags write into settings of the whole process when they are parsed,
// so they are parsed once, by the API server that runs.
var sharedFlags = []string{"feature-gates", "emulated-version", "emulation-forward-compatible", "runtime-config-emulation-forward-compatible", "min-compatibility-version"}

// checkArgs refuses pass-through flags that cannot work, before anything
// starts.
func checkArgs(cfg Config) error {
	if err := checkComponentArgs("API server", cfg.APIServerArgs, true, options.NewServerRunOptions().Flags()); err != nil {
		return err
	}
	if err := checkComponentArgs("scheduler", cfg.SchedulerArgs, false, *scheduleroptions.NewOptions().Flags); err != nil {
		return err
	}
	o, err := kcmoptions.NewKubeControllerManagerOptions()
	if err != nil {
		return fmt.Errorf("control plane: controller manager options: %w", err)
	}
	return checkComponentArgs("controller manager", cfg.ControllerManagerArgs, false,
		o.Flags(kcm.KnownControllers(), kcm.ControllersDisabledByDefault(), kcm.ControllerAliases()))
}

func checkComponentArgs(component string, args []string, shared bool, sets cliflag.NamedFlagSets) error {
	var own []string
	for _, arg := range args {
		name, isFlag := flagName(arg)
		if !isFlag {
			return fmt.Errorf("control plane: %s argument %q is not a flag; write it as --name=value", component, arg)
		}
		if use, set := ownFlags[name]; set {
			return fmt.Errorf("control plane: %s argument --%s is set by the hub; change %s instead", component, name, use)
		}
		if !slices.Contains(sharedFlags, name) {
			own = append(own, arg)
		} else if !shared {
			return fmt.Errorf("control plane: %s argument --%s: the components share this setting; give it as an API server argument", component, name)
		}
	}
	return parse(component, sets, own)
}

func flagName(arg string) (string, bool) {
	name, ok := strings.CutPrefix(arg, "--")
	if !ok {
		return "", false
	}
	name, _, _ = strings.Cut(name, "=")
	return strings.ReplaceAll(name, "_", "-"), name != ""
}

func (p *Plane) apiServerFlags(etcd []string, n names) []string {
	pki := p.pkiFile
	flags := []string{
		"--etcd-servers=" + strings.Join(etcd, ","),
		"--secure-port=" + strconv.Itoa(n.port),
		"--service-cluster-ip-range=" + p.service.String(),
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true",
		"--profiling=false",

		"--tls-cert-file=" + pki("apiserver.crt"),
		"--tls-private-key-file=" + pki("apiserver.key"),
		"--client-ca-file=" + pki("ca.crt"),

		"--kubelet-certificate-authority=" + pki("ca.crt"),
		"--kubelet-client-certificate=" + pki("apiserver-kubelet-client.crt"),
		"--kubelet-client-key=" + pki("apiserver-kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",

		"--requestheader-client-ca-file=" + pki("front-proxy-ca.crt"),
		"--requestheader-allowed-names=" + frontProxyName,
		"--requestheader-username-headers=X-Remote-User",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + pki("front-proxy-client.crt"),
		"--proxy-client-key-file=" + pki("front-proxy-client.key"),

		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + pki("sa.pub"),
		"--service-account-signing-key-file=" + pki("sa.key"),

		"--default-not-ready-toleration-seconds=" + strconv.FormatInt(p.cfg.DefaultTolerationSeconds, 10),
		"--default-unreachable-toleration-seconds=" + strconv.FormatInt(p.cfg.DefaultTolerationSeconds, 10),
	}
	if n.advertise != nil {
		flags = append(flags, "--advertise-address="+n.advertise.String())
	} else {
		flags = append(flags, "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none")
	}
	return append(flags, p.cfg.APIServerArgs...)
}

func (p *Plane) controllerManagerFlags() []string {
	pki := p.pkiFile
	return append([]string{
		"--kubeconfig=" + p.componentKubeconfig("controller-manager"),
		"--leader-elect=false",
		"--secure-port=0", // no port and no delegated authentication
		"--profiling=false",
		"--use-service-account-credentials=true",
		"--service-account-private-key-file=" + pki("sa.key"),
		"--root-ca-file=" + pki("ca.crt"),
		"--cluster-signing-cert-file=" + pki("ca.crt"),
		"--cluster-signing-key-file=" + pki("ca.key"),
		"--service-cluster-ip-range=" + p.service.String(),
		// With an identity per controller, booting makes some 100 requests one
		// after the other; the default of 20 a second makes that five seconds.
		"--kube-api-qps=1000",
		"--kube-api-burst=2000",
	}, p.cfg.ControllerManagerArgs...)
}

func (p *Plane) schedulerFlags() []string {
	return append([]string{
		"--kubeconfig=" + p.componentKubeconfig("scheduler"),
		"--leader-elect=false",
		"--secure-port=0",
		"--profiling=false",
	}, p.cfg.SchedulerArgs...)
}

// parse reads flags as the component's own command line would.
func parse(component string, sets cliflag.NamedFlagSets, flags []string) error {
	fs := pflag.NewFlagSet(component, pflag.ContinueOnError)
	fs.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	for _, set := range sets.FlagSets {
		fs.AddFlagSet(set)
	}
	if err := fs.Parse(flags); err != nil {
		return fmt.Errorf("control plane: %s arguments: %w", component, err)
	}
	return nil
}
