package controlplane

import (
	"net"
	"os"

	utilnet "k8s.io/apimachinery/pkg/util/net"
)

// names is how this machine and the cluster call the API server.
type names struct {
	port      int
	advertise net.IP // what pods and others are told; nil when there is nothing to tell
	dns       []string
	ips       []net.IP
}

func (n names) server() serverNames { return serverNames{dns: n.dns, ips: n.ips} }

// names collects them for the address listened on.
func (p *Plane) names(addr *net.TCPAddr) names {
	n := names{
		port: addr.Port,
		dns: []string{
			"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
			"kubernetes.default.svc.cluster.local",
		},
		// The API server's own service always has the range's first address.
		ips: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback, p.service.Addr().Next().AsSlice()},
	}
	if host, err := os.Hostname(); err == nil && host != "localhost" {
		n.dns = append(n.dns, host)
	}
	if addr.IP.IsUnspecified() {
		n.ips = append(n.ips, machineAddresses()...)
	} else {
		n.ips = append(n.ips, addr.IP)
	}
	n.advertise = p.advertise(addr.IP)
	if n.advertise != nil {
		n.ips = append(n.ips, n.advertise)
	}
	for _, san := range p.cfg.ExtraSANs {
		if ip := net.ParseIP(san); ip != nil {
			n.ips = append(n.ips, ip)
		} else {
			n.dns = append(n.dns, san)
		}
	}
	return n
}

func (p *Plane) advertise(listen net.IP) net.IP {
	if p.cfg.AdvertiseAddress != "" {
		return net.ParseIP(p.cfg.AdvertiseAddress)
	}
	if listen.IsGlobalUnicast() {
		return listen
	}
	if ip, err := utilnet.ChooseHostInterface(); err == nil {
		return ip
	}
	return nil // a machine without a route; nobody else could reach it anyway
}

// machineAddresses are those other machines may know this one by.
func machineAddresses() []net.IP {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var ips []net.IP
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			ips = append(ips, n.IP)
		}
	}
	return ips
}

// localAddress is how this machine itself reaches a listener.
func localAddress(addr *net.TCPAddr) string {
	if addr.IP.IsUnspecified() {
		return (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: addr.Port}).String()
	}
	return addr.String()
}
