//go:build !linux

package faults

// reserveAddr returns a local address with port 0. Only Linux can reserve a
// port.
func reserveAddr() string { return "127.0.0.1:0" }
