package pqdriver

import (
	"net"
	"time"
)

// DeadAfter is the approximate time until a connection notices that its server died
// without closing it. It applies while the client waits for an answer and while it
// waits for an acknowledgement. The defaults are 150 seconds in Go for the first and
// 15 minutes in Linux for the second.
const DeadAfter = 15 * time.Second

// keptAlive dials connections with TCP keepalives. lib/pq has no settings for them:
// https://github.com/lib/pq/pull/1337.
var keptAlive = net.Dialer{
	KeepAliveConfig: net.KeepAliveConfig{
		Enable:   true,
		Idle:     DeadAfter / 3,
		Interval: DeadAfter / 3,
		Count:    2,
	},
	Control: setUserTimeout,
}
