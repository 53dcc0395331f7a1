package admission

import (
	"net"
	"net/netip"
	"strings"

	"github.com/labstack/echo/v4"
)

// ipv6Network is the prefix length of one client's network. A client can use every
// address of its /64.
const ipv6Network = 64

// addressOf returns the client's IPv4 address or IPv6 network.
func addressOf(c echo.Context) string {
	text, _, _ := strings.Cut(c.RealIP(), "%") // a link-local address's zone
	address, err := netip.ParseAddr(text)
	if err != nil {
		return text
	}
	address = address.Unmap()
	if address.Is4() {
		return address.String()
	}
	network, _ := address.Prefix(ipv6Network) // never fails for 64 bits of 128
	return network.String()
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
	return echo.ExtractIPFromXFFHeader(options...)
}
