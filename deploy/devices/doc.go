// Package devices simulates devices that speak MQTT as real ones do, for the
// demo, the tests and the benchmarks: a radiator thermostat behind
// Zigbee2MQTT (Thermostat) and a plug with Tasmota (Plug).
//
// It owns what such a device says and does: its topics and payloads, its will,
// what it does on a new connection, what it keeps over a power cut, and a
// little physics, so that values move as they would. It never knows Skerry:
// nothing here would be different with another system at the broker.
//
// A simulated device is a state machine without a clock or a connection of its
// own (device); Run gives it both.
package devices
