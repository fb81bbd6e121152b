// Package identity owns what makes this machine a node: its key, its
// certificate, the hub's CA and the hub's address. It joins a hub with a
// token, keeps the result on disk so that it is there whole or not at all,
// hands out the TLS configuration every connection to the hub uses, and
// renews the certificate in time.
//
// It trusts no certificate authority but the one a join token named, never
// turns verification off, never writes the token's secret to disk or log, and
// holds no connection open.
package identity
