package admission

import (
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/labstack/echo/v4"
)

const (
	// ipv6Network is the prefix length of one client's network. A client can use every
	// address of its /64.
	ipv6Network = 64
	// ipv6Site is the prefix length of the networks that a customer of a provider can have.
	ipv6Site = 48
	// siteFactor is the number of clients that one site may have.
	siteFactor = 16
)

// addressOf returns the client's IPv4 address or IPv6 network.
func addressOf(c echo.Context) string {
	address, err := parseAddress(c)
	if err != nil {
		return c.RealIP()
	}
	if address.Is4() {
		return address.String()
	}
	network, _ := address.Prefix(ipv6Network) // never fails for 64 bits of 128
	return network.String()
}

// siteOf returns the site of the client's IPv6 address, if it has one.
func siteOf(c echo.Context) (site string, isIPv6 bool) {
	address, err := parseAddress(c)
	if err != nil || address.Is4() {
		return "", false
	}
	network, _ := address.Prefix(ipv6Site)
	return network.String(), true
}

func parseAddress(c echo.Context) (netip.Addr, error) {
	text, _, _ := strings.Cut(c.RealIP(), "%") // a link-local address's zone
	address, err := netip.ParseAddr(text)
	return address.Unmap(), err
}

// ClientAddress returns the function with which Echo finds a client's address. The
// function returns the address of the connection. If the connection comes from a
// trusted network, it returns the address in X-Forwarded-For.
func ClientAddress(trusted []netip.Prefix) echo.IPExtractor {
	if len(trusted) == 0 {
		return echo.ExtractIPDirect()
	}
	options := []echo.TrustOption{echo.TrustLoopback(false), echo.TrustLinkLocal(false), echo.TrustPrivateNet(false)}
	for _, prefix := range trusted {
		options = append(options, echo.TrustIPRange(&net.IPNet{
			IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
		}))
	}
	extract := echo.ExtractIPFromXFFHeader(options...)
	return func(r *http.Request) string { return extract(withoutPorts(r)) }
}

// withoutPorts returns the request without the ports that some proxies add to the addresses
// in X-Forwarded-For. Echo would take such an address for invalid.
func withoutPorts(r *http.Request) *http.Request {
	given := r.Header.Values(echo.HeaderXForwardedFor)
	addresses := strings.Split(strings.Join(given, ","), ",")
	for i, text := range addresses {
		if parsed, err := netip.ParseAddrPort(strings.TrimSpace(text)); err == nil {
			addresses[i] = parsed.Addr().String()
		}
	}
	return &http.Request{RemoteAddr: r.RemoteAddr, Header: http.Header{echo.HeaderXForwardedFor: {strings.Join(addresses, ",")}}}
}
