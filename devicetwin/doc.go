// Package devicetwin keeps, for each device of a node, what is wanted of it and
// what it last said, and brings the two together.
//
// It owns the rules: which of two words is newer, who wins between the cloud
// and the node, what a reading is worth, when a device is taken for gone. It
// speaks to devices through a Driver and never knows their protocol; it never
// knows Kubernetes beyond the types of its API, and never dials.
package devicetwin
