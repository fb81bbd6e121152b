package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/skerry-io/skerry/e2e/cluster"
	"github.com/skerry-io/skerry/e2e/machine"
)

// world is a hub and an edge node whose Node is Ready.
type world struct {
	hub    *cluster.Hub
	node   *cluster.Node
	client kubernetes.Interface
}

func (b *bench) world(ctx context.Context, name, node string) (_ *world, err error) {
	dir := filepath.Join(b.dir, name)
	w := &world{}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	w.node, err = cluster.NewNode(cluster.NodeConfig{Dir: filepath.Join(dir, node), Name: node, Programs: b.programs, Images: b.images})
	if err != nil {
		return nil, err
	}
	// The API server listens where a plain kubelet can reach it.
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	names := []string{w.node.HostIP()}
	for i := 1; i < 20; i++ {
		names = append(names, fmt.Sprintf("10.199.%d.1", i))
	}
	w.hub, err = cluster.NewHub(cluster.HubConfig{Dir: filepath.Join(dir, "hub"), Programs: b.programs, Names: names, API: "0.0.0.0:" + port})
	if err != nil {
		return nil, err
	}
	if err := w.hub.Start(ctx); err != nil {
		return nil, err
	}
	if w.client, err = w.hub.Client(); err != nil {
		return nil, err
	}
	if err := w.node.Boot(ctx); err != nil {
		return nil, err
	}
	if err := w.node.Join(ctx, w.hub); err != nil {
		return nil, err
	}
	if err := w.node.Run(ctx); err != nil {
		return nil, err
	}
	return w, w.awaitNode(ctx, node)
}

func (w *world) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var errs []error
	if w.node != nil {
		errs = append(errs, w.node.Destroy(ctx))
	}
	if w.hub != nil && w.hub.Running() {
		errs = append(errs, w.hub.Stop(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		fmt.Fprintln(os.Stderr, "bench: clean up:", err)
	}
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}

func (w *world) awaitNode(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		n, err := w.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err == nil {
			for _, c := range n.Status.Conditions {
				if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
					return nil
				}
			}
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("node %s is not Ready: %w", name, err)
		}
	}
}

// start creates the pods at once and returns how long it took until a watch at
// the API server showed the last of them as cond wants it.
func (w *world) start(ctx context.Context, pods []*corev1.Pod, cond func(*corev1.Pod) bool) (time.Duration, error) {
	if len(pods) == 0 {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for { // the namespace's service account may not be there yet
		if _, err := w.client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{}); err == nil {
			break
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return 0, err
		}
	}
	watch, err := w.client.CoreV1().Pods("default").Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return 0, err
	}
	defer watch.Stop()
	waiting := map[string]bool{}
	began := time.Now()
	for _, p := range pods {
		waiting[p.Name] = true
		if _, err := w.client.CoreV1().Pods("default").Create(ctx, p, metav1.CreateOptions{}); err != nil {
			return 0, err
		}
	}
	for e := range watch.ResultChan() {
		if p, ok := e.Object.(*corev1.Pod); ok && waiting[p.Name] && cond(p) {
			delete(waiting, p.Name)
			if len(waiting) == 0 {
				return time.Since(began), nil
			}
		}
	}
	return 0, fmt.Errorf("%d pods did not start: %w", len(waiting), ctx.Err())
}

// deletePods removes all pods and waits for their end.
func (w *world) deletePods(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := w.client.CoreV1().Pods("default").DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		return err
	}
	for {
		list, err := w.client.CoreV1().Pods("default").List(ctx, metav1.ListOptions{})
		if err == nil && len(list.Items) == 0 {
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

// plain is a machine with an upstream kubelet as it comes.
type plain struct {
	m    *machine.Machine
	proc *machine.Proc
}

// plainConfig is what the edge node's kubelet has as well: the cgroup driver
// and root, the runtime, and no swap or certificate questions.
const plainConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: %s
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: %s
resolvConf: ""
makeIPTablesUtilChains: false
`

func (b *bench) plainKubelet(ctx context.Context, w *world, name string) (_ *plain, err error) {
	dir := filepath.Join(b.dir, name+"-"+strconv.FormatInt(time.Now().UnixNano(), 36))
	m, err := machine.New(machine.Config{Dir: dir, Name: name + "-bench",
		Binds: []machine.Bind{{Host: b.kubelet, Inside: "/opt/kubelet"}}})
	if err != nil {
		return nil, err
	}
	p := &plain{m: m}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if err := m.Start(ctx); err != nil {
		return nil, err
	}
	for _, tar := range b.images {
		if err := m.ImportImage(ctx, tar); err != nil {
			return nil, err
		}
	}
	kubeconfig, err := nodeKubeconfig(ctx, w, name, m.HostIP())
	if err != nil {
		return nil, err
	}
	etc := m.Disk("/etc/plain")
	if err := os.MkdirAll(etc, 0o700); err != nil {
		return nil, err
	}
	for file, text := range map[string]string{
		"kubeconfig":  kubeconfig,
		"config.yaml": fmt.Sprintf(plainConfig, m.CgroupRoot(), machine.ContainerdEndpoint),
	} {
		if err := os.WriteFile(filepath.Join(etc, file), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	log, err := os.Create(filepath.Join(dir, "kubelet.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.proc, err = m.Exec(context.WithoutCancel(ctx), machine.Command{
		Name: "kubelet", Stdout: log, Stderr: log,
		Args: []string{"/opt/kubelet", "--kubeconfig", "/etc/plain/kubeconfig", "--config", "/etc/plain/config.yaml",
			"--hostname-override", name, "--node-ip", m.IP()},
	})
	if err != nil {
		return nil, err
	}
	if err := w.awaitNode(ctx, name); err != nil {
		out, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("plain kubelet: %w\n%s", err, out[max(0, len(out)-2000):])
	}
	return p, nil
}

func (p *plain) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := p.m.Destroy(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench: clean up:", err)
	}
}

func (p *plain) pid() (int, error) { return p.proc.HostPID() }

// nodeKubeconfig gets a certificate for a node from the cluster's own signer.
func nodeKubeconfig(ctx context.Context, w *world, name, host string) (string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "system:node:" + name, Organization: []string{"system:nodes"}}}, key)
	if err != nil {
		return "", err
	}
	csrs := w.client.CertificatesV1().CertificateSigningRequests()
	csr, err := csrs.Create(ctx, &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: name + "-"},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName: certificatesv1.KubeAPIServerClientKubeletSignerName,
			Usages:     []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Bench", Message: "a plain kubelet to compare with"}}
	if _, err := csrs.UpdateApproval(ctx, csr.Name, csr, metav1.UpdateOptions{}); err != nil {
		return "", err
	}
	for len(csr.Status.Certificate) == 0 {
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return "", err
		}
		if csr, err = csrs.Get(ctx, csr.Name, metav1.GetOptions{}); err != nil {
			return "", err
		}
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", err
	}
	admin, err := w.hub.RESTConfig()
	if err != nil {
		return "", err
	}
	_, port, err := net.SplitHostPort(w.hub.APIAddress())
	if err != nil {
		return "", err
	}
	ca := admin.CAData
	if len(ca) == 0 {
		if ca, err = os.ReadFile(admin.CAFile); err != nil {
			return "", err
		}
	}
	out, err := clientcmd.Write(clientcmdapi.Config{
		CurrentContext: "node",
		Clusters:       map[string]*clientcmdapi.Cluster{"node": {Server: "https://" + net.JoinHostPort(host, port), CertificateAuthorityData: ca}},
		AuthInfos: map[string]*clientcmdapi.AuthInfo{"node": {ClientCertificateData: csr.Status.Certificate,
			ClientKeyData: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})}},
		Contexts: map[string]*clientcmdapi.Context{"node": {Cluster: "node", AuthInfo: "node"}},
	})
	return string(out), err
}
