// Package migrate turns KubeEdge's device manifests into Skerry's.
//
// It owns the translation of devices.kubeedge.io v1beta1 and v1alpha2
// DeviceModels and Devices, field by field, and tells of each field that it
// cannot carry, or carries with another meaning, where it is, why, and what to
// do. It never talks to a cluster and never drops a field silently; what it
// writes, Skerry's API server takes.
//
// Where the two differ in kind:
//
//   - A KubeEdge DeviceModel is of a namespace, Skerry's of the cluster: equal
//     namesakes become one, others get their namespace before their name.
//   - KubeEdge keeps in each Device how a property is reached, how often, and
//     where it is pushed to; Skerry keeps that in the model. Devices of one
//     model that differ in it get models of their own, <model>-2 and so on.
//     Topics and the protocol's configuration stay with the device, as params.
//   - KubeEdge needs a mapper for MQTT. Properties whose visitor is MQTT's get
//     the profile json and need none. All else gets the profile external (a
//     mapper as before) or, from v1alpha2, whose mappers speak $hw topics, the
//     profile kubeedge.
//   - collectCycle and reportCycle are milliseconds to KubeEdge's mappers,
//     though many manifests have nanoseconds in them.
//   - The status is not carried: what a device last said, it says again.
package migrate
