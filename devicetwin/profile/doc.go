// Package profile carries what devices say over MQTT into their twins, and what
// is wanted of them back, as their models tell: topics, paths, words, scales and
// expressions, with the manners of each kind of device already known.
//
// It owns the mapping and the subscriptions. It keeps no values: what it learns
// at run time (a Sparkplug alias, a Homie state) it can learn again. It never
// decides whether a value is allowed, newer or wanted; that is the twin's.
//
// A message is handled on the broker's goroutine, under the lock of the device
// it concerns. That keeps a device's messages in order without a queue, and a
// device that floods is slowed by its own acknowledgements. Each filter is
// subscribed to once, however many properties want it; the broker's own tree is
// what finds them, so a message costs what it concerns and not the number of
// devices.
//
// # Substitution
//
// ${name} stands for a param of the Device, or for device, namespace, node,
// replyTo (a place for answers to this node), cmdSeq (a number, another in each
// message) and, in what is written, value. In a command it stands for the
// command's arguments and cmdId as well. In a payload that is JSON it is put in
// encoded: outside of quotes numbers, true, false and null as they are and all
// else as a JSON string; within quotes as the inside of one. Everywhere else it
// is put in as it is.
//
// A param cannot bring wildcards into a topic, and no model reaches topics
// under skerry/ or $SYS/.
//
// # Words and numbers
//
// The keys of map are what the device says (numbers and booleans as JSON spells
// them), its values are the property's. A value of null is a word for nothing.
// The first word, in the order of their bytes, that has a value is said for it.
// scale and offset are taken as the decimal numbers they are written as, so 213
// times 0.1 is 21.3; whole numbers are exact at any size of 64 bits, and a
// fraction that is to be an int64 is rounded when the scale is one. Writing uses
// the scale and offset of the first read.
//
// A path that a payload does not have is no reading: devices send parts. A value
// that cannot be had is a bad reading that says why. Payloads of more than
// 256 KiB, or nested deeper than 64, are not read.
//
// # Profiles
//
// raw and json have no manners: every topic is the model's. With zigbee2mqtt,
// tasmota, shelly2 and homie5 a read.path is enough: topics, writes, questions
// and presence are the profile's, unless the model has its own. homeassistant
// takes them from the device's discovery config. sparkplugB follows births,
// aliases and the sequence of edge nodes; kubeedge answers on KubeEdge's $hw
// topics; external is for mappers, which speak HTTP over a unix socket. What
// each needs of params and profileConfig is said at its variable.
//
// # Discovery
//
// A DeviceDiscovery watches one profile's announcements. Candidates are told
// whole, at most once a second, under names that are the same at every sight.
// A node holds 500 candidates at most and takes 20 new ones a second, after a
// first burst of 500: what brokers retain comes all at once and only once.
// Attributes are 16 at most, of 256 bytes. Whether a candidate has gone is for
// who keeps the Devices; it has the time when each was last seen.
package profile
