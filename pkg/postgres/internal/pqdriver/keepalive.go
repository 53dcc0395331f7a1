package pqdriver

import (
	"net"
	"time"
)

// DeadAfter is about how long it takes to notice a server that has gone without
// closing its connections, whether the client waits for an answer or for the
// acknowledgement of what it has sent. By default the first takes Go 150 seconds, and
// the second takes Linux a quarter of an hour.
const DeadAfter = 15 * time.Second

// keptAlive dials connections whose server the kernel checks. lib/pq has no settings
// for that: https://github.com/lib/pq/pull/1337.
var keptAlive = net.Dialer{
	KeepAliveConfig: net.KeepAliveConfig{
		Enable:   true,
		Idle:     DeadAfter / 3,
		Interval: DeadAfter / 3,
		Count:    2,
	},
	Control: setUserTimeout,
}
