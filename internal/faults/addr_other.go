//go:build !linux

package faults

// reserveAddr returns a local address with any free port: only Linux can reserve
// one.
func reserveAddr() string { return "127.0.0.1:0" }
