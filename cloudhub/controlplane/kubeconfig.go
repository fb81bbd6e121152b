package controlplane

import (
	"fmt"
	"os"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// writeKubeconfigs writes the administrator's kubeconfig, which carries its
// certificates and may be copied to another machine, and those of the
// controller manager and the scheduler, which name files that are read again
// when they are renewed.
func (p *Plane) writeKubeconfigs() error {
	cert, err := os.ReadFile(p.pkiFile("admin.crt"))
	if err != nil {
		return fmt.Errorf("control plane: administrator's kubeconfig: %w", err)
	}
	key, err := os.ReadFile(p.pkiFile("admin.key"))
	if err != nil {
		return fmt.Errorf("control plane: administrator's kubeconfig: %w", err)
	}
	admin := kubeconfig("skerry", "admin",
		&clientcmdapi.Cluster{Server: p.URL(), CertificateAuthorityData: p.CABundle()},
		&clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key})
	if err := writeKubeconfig(p.AdminKubeconfigPath(), admin); err != nil {
		return err
	}
	for _, name := range []string{"controller-manager", "scheduler"} {
		own := kubeconfig("skerry", name,
			&clientcmdapi.Cluster{Server: p.URL(), CertificateAuthority: p.pkiFile("ca.crt")},
			&clientcmdapi.AuthInfo{ClientCertificate: p.pkiFile(name + ".crt"), ClientKey: p.pkiFile(name + ".key")})
		if err := writeKubeconfig(p.componentKubeconfig(name), own); err != nil {
			return err
		}
	}
	return nil
}

func (p *Plane) componentKubeconfig(name string) string { return p.pkiFile(name + ".kubeconfig") }

func kubeconfig(cluster, user string, c *clientcmdapi.Cluster, a *clientcmdapi.AuthInfo) *clientcmdapi.Config {
	k := clientcmdapi.NewConfig()
	k.Clusters[cluster] = c
	k.AuthInfos[user] = a
	k.Contexts[cluster] = &clientcmdapi.Context{Cluster: cluster, AuthInfo: user}
	k.CurrentContext = cluster
	return k
}

func writeKubeconfig(path string, k *clientcmdapi.Config) error {
	data, err := clientcmd.Write(*k)
	if err == nil {
		err = writeFile(path, data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("control plane: write kubeconfig %s: %w", path, err)
	}
	return nil
}
