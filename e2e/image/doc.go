// Package image makes container images of static Go programs, as OCI archives
// that containerd imports: no container runtime and no registry is needed.
//
// It holds the two programs that tests and the demo run in pods, demo and
// pause, and knows how to build images of them. It never loads an image
// anywhere; callers hand the archive to a machine.
package image
