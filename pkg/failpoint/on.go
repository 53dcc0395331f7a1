//go:build failpoints

package failpoint

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Env is the environment variable that sets a failpoint. POINT=kill kills the program
// with SIGKILL when it first reaches the point. POINT=stop suspends it until SIGCONT.
// POINT=kill@3 acts on the third visit.
const Env = "FAILPOINT"

var (
	point, signal, visit = parse(os.Getenv(Env))
	visits               atomic.Int64
)

func parse(setting string) (at Point, s syscall.Signal, n int64) {
	if setting == "" {
		return "", 0, 0
	}
	name, action, _ := strings.Cut(setting, "=")
	action, count, counted := strings.Cut(action, "@")
	n = 1
	if counted {
		n, _ = strconv.ParseInt(count, 10, 64)
	}
	s = map[string]syscall.Signal{"kill": syscall.SIGKILL, "stop": syscall.SIGSTOP}[action]
	if !slices.Contains(All, Point(name)) || s == 0 || n < 1 {
		panic("invalid " + Env + ": " + setting)
	}
	return Point(name), s, n
}

// At kills or suspends the program if Env names the point.
func At(p Point) {
	if p == point && visits.Add(1) == visit {
		fmt.Fprintf(os.Stderr, "{\"msg\":\"failpoint reached\",\"point\":%q}\n", p)
		_ = syscall.Kill(os.Getpid(), signal)
		if signal == syscall.SIGKILL {
			select {}
		}
		time.Sleep(100 * time.Millisecond) // the system may deliver SIGSTOP with a delay
	}
}
