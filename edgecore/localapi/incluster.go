package localapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/skerry-io/skerry/edgecore/store"
)

// KubeletView is an object as the kubelet is to see it when pods are served:
// the Service that gives containers KUBERNETES_SERVICE_HOST and _PORT stands at
// this API, and the root certificates that pods mount hold this node's too. So
// client-go's in-cluster configuration works as it is. In the store, and for
// everyone else, both are the cluster's.
func (s *Server) KubeletView() func(o *store.Object) []byte {
	if s == nil || !s.podAddr.IsValid() {
		return nil
	}
	return func(o *store.Object) []byte {
		body, err := o.Body, error(nil)
		switch {
		case o.Resource == "services" && o.Namespace == "default" && o.Name == "kubernetes":
			body, err = edit(o.Body, "spec", s.serviceHere)
		case o.Resource == "configmaps" && o.Name == "kube-root-ca.crt":
			body, err = edit(o.Body, "data", s.trustHere)
		}
		if err != nil {
			s.log.Error("pods do not find the local API", "object", o.Key.String(), "err", err)
			return o.Body
		}
		return body
	}
}

// edit changes one top-level object of a body.
func edit(body []byte, field string, change func(map[string]json.RawMessage) error) ([]byte, error) {
	top, inner := map[string]json.RawMessage{}, map[string]json.RawMessage{}
	if err := json.Unmarshal(body, &top); err != nil {
		return nil, err
	}
	if raw, ok := top[field]; ok {
		if err := json.Unmarshal(raw, &inner); err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
	}
	if err := change(inner); err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	raw, err := json.Marshal(inner)
	if err != nil {
		return nil, err
	}
	top[field] = raw
	return json.Marshal(top)
}

func (s *Server) serviceHere(spec map[string]json.RawMessage) error {
	ip, port := s.podAddr.Addr().String(), s.podAddr.Port()
	spec["clusterIP"] = fmt.Appendf(nil, "%q", ip)
	spec["clusterIPs"] = fmt.Appendf(nil, "[%q]", ip)
	spec["ports"] = fmt.Appendf(nil, `[{"name":"https","protocol":"TCP","port":%d,"targetPort":%d}]`, port, port)
	return nil
}

func (s *Server) trustHere(data map[string]json.RawMessage) error {
	var roots string
	if raw, ok := data["ca.crt"]; ok {
		if err := json.Unmarshal(raw, &roots); err != nil {
			return fmt.Errorf("ca.crt: %w", err)
		}
	}
	if roots != "" && !strings.HasSuffix(roots, "\n") {
		roots += "\n"
	}
	raw, err := json.Marshal(roots + string(s.ca.pem))
	data["ca.crt"] = raw
	return err
}

// ensurePodAddress gives the machine the address if it has not got it: pods
// reach any address of their host by their default route. The label tells it
// from addresses of other people's.
func ensurePodAddress(ip netip.Addr) error {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("local API for pods: %w", err)
	}
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Unmap() == ip.Unmap() {
			return nil
		}
	}
	if !ip.Is4() || !ip.IsLinkLocalUnicast() {
		return fmt.Errorf("local API for pods: no interface has %s; set localAPI.podListen to an address of this machine, or to one in 169.254.0.0/16, which is added to the loopback interface", ip)
	}
	err = withInterface(func(fd int, ifr *unix.Ifreq) error {
		if err := ifr.SetInet4Addr(ip.AsSlice()); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCSIFADDR, ifr); err != nil {
			return err
		}
		if err := ifr.SetInet4Addr([]byte{255, 255, 255, 255}); err != nil {
			return err
		}
		return unix.IoctlIfreq(fd, unix.SIOCSIFNETMASK, ifr)
	})
	if err != nil {
		return fmt.Errorf("local API for pods: add %s to the loopback interface: %w", ip, err)
	}
	return nil
}

// DropPodAddress removes an address of an earlier run that served pods.
func DropPodAddress() error {
	err := withInterface(func(fd int, ifr *unix.Ifreq) error {
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFADDR, ifr); err != nil {
			return nil // there is none
		}
		if err := ifr.SetInet4Addr([]byte{0, 0, 0, 0}); err != nil {
			return err
		}
		return unix.IoctlIfreq(fd, unix.SIOCSIFADDR, ifr) // none: the label goes
	})
	if err != nil {
		return fmt.Errorf("local API: remove the address for pods from the loopback interface: %w", err)
	}
	return nil
}

func withInterface(do func(fd int, ifr *unix.Ifreq) error) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ifr, err := unix.NewIfreq(podInterface)
	if err == nil {
		err = do(fd, ifr)
	}
	return errors.Join(err, unix.Close(fd))
}
