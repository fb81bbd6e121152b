// Package enroll decides which machines are nodes: it keeps the hub's
// certificate authority, hands out and redeems join tokens, issues and renews
// node certificates, gives every node its virtual IP, and tells from a
// connection's certificate which node is calling.
//
// All of its state lives in Secrets of one namespace, so that any number of
// hub replicas share it: the CA (skerry-ca), join tokens (join-token.ID, with
// a hash of the token's secret), nodes (node.NAME) and claims on virtual IPs
// (ip.ADDRESS). Replicas meet only there; every change that must happen once
// rests on the API server's optimistic concurrency.
//
// It never opens a listener or a tunnel, never writes Node objects, and never
// keeps or logs the secret of a token.
package enroll
