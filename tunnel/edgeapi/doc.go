// Package edgeapi is the one description of what an edge node and the hub say
// to each other inside a tunnel: the kinds of stream, the messages of the
// object sync, and the requests that enrol a node.
//
// It owns types, framing and limits. It never dials, stores or decides
// anything, and it knows neither program: cloudhub and edgecore both import
// it, it imports neither.
package edgeapi
