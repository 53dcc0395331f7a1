// Package faultydisk simulates disk faults of a server.
package faultydisk

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/needs"
)

// Disk is a server's disk that can fail. The server must run with Env.
type Disk struct {
	Env     []string
	control string
}

//go:embed disk/disk.c
var diskSource string

// NewDisk returns a working disk for the duration of the spec. It skips the
// spec if the C compiler is missing.
func NewDisk() *Disk {
	ginkgo.GinkgoHelper()
	compiler := needs.Compiler()
	dir, err := os.MkdirTemp("", "diehard-disk-*")
	Expect(err).NotTo(HaveOccurred())
	ginkgo.DeferCleanup(os.RemoveAll, dir)
	Expect(os.Chmod(dir, 0o755)).To(Succeed()) //nolint:gosec // the server may run as another user
	source, library := filepath.Join(dir, "disk.c"), filepath.Join(dir, "disk.so")
	Expect(os.WriteFile(source, []byte(diskSource), 0o600)).To(Succeed())
	output, err := exec.Command(compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl").CombinedOutput() //nolint:gosec,noctx // our own source; takes a moment
	Expect(err).NotTo(HaveOccurred(), "%s", output)
	control := filepath.Join(dir, "fault")
	return &Disk{Env: []string{"LD_PRELOAD=" + library, "FAULTY_DISK=" + control}, control: control}
}

// Call is a kind of system call.
type Call string

// The calls that can fail.
const (
	Create Call = "open" // only calls that may create a file
	Write  Call = "write"
	Rename Call = "rename"
	// Space is the query for free space. If it fails, it reports that no space is
	// free.
	Space Call = "space"
)

// Fail makes the calls fail on files whose paths contain part.
func (d *Disk) Fail(call Call, part string, errno syscall.Errno) {
	ginkgo.GinkgoHelper()
	d.rule(fmt.Sprintf("%s %s %d", call, part, int(errno)))
}

// Kill ends the server like a power cut, at the first such call and before the call
// takes effect.
func (d *Disk) Kill(call Call, part string) {
	ginkgo.GinkgoHelper()
	d.rule(fmt.Sprintf("%s %s kill", call, part))
}

func (d *Disk) rule(rule string) {
	ginkgo.GinkgoHelper()
	next := d.control + ".next"
	Expect(os.WriteFile(next, []byte(rule), 0o644)).To(Succeed()) //nolint:gosec // the server may run as another user
	Expect(os.Rename(next, d.control)).To(Succeed())
}

// Repair removes the fault.
func (d *Disk) Repair() {
	ginkgo.GinkgoHelper()
	Expect(os.Remove(d.control)).To(Succeed())
}
