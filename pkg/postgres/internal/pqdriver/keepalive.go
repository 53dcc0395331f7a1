package pqdriver

import (
	"net"
	"time"
)

// DeadAfter is the approximate time until a connection notices that its server died
// without closing it. It applies to the wait for a reply and to the wait for a TCP
// acknowledgement. By default, Go waits 150 seconds for a reply, and Linux waits 15
// minutes for an acknowledgement.
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
