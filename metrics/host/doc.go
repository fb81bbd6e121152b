// Package host measures the machine this process runs on: processors, memory,
// file systems, disks, network interfaces, load, uptime and temperatures.
//
// One loop takes a sample per period; readers and scrapes get the latest one
// and never cause work, so the cost is the same however many ask. What has no
// natural bound (interfaces, disks, sensors) is cut at a fixed number. It never
// runs a program and never asks a network file system, which may hang.
package host
