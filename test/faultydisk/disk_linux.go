// Package faultydisk makes the disk below a server fail.
package faultydisk

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/diehard-outbox/diehard/internal/needs"
	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// Disk is a server's disk that can fail. The server has to run with Env.
type Disk struct {
	Env     []string
	control string
}

//go:embed disk/disk.c
var diskSource string

// NewDisk returns a disk that works, for as long as the spec runs. The spec is
// left out if there is no C compiler.
func NewDisk() *Disk {
	ginkgo.GinkgoHelper()
	compiler := needs.Compiler()
	dir, err := os.MkdirTemp("", "diehard-disk-*")
	Expect(err).NotTo(HaveOccurred())
	ginkgo.DeferCleanup(os.RemoveAll, dir)
	Expect(os.Chmod(dir, 0o755)).To(Succeed()) //nolint:gosec // the server may be another user's
	source, library := filepath.Join(dir, "disk.c"), filepath.Join(dir, "disk.so")
	Expect(os.WriteFile(source, []byte(diskSource), 0o600)).To(Succeed())
	output, err := exec.Command(compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl").CombinedOutput() //nolint:gosec,noctx // our own source; a moment
	Expect(err).NotTo(HaveOccurred(), "%s", output)
	control := filepath.Join(dir, "fault")
	return &Disk{Env: []string{"LD_PRELOAD=" + library, "FAULTY_DISK=" + control}, control: control}
}

// Call is what a server asks of its disk.
type Call string

// Calls.
const (
	Create Call = "open" // only of files that may be made
	Write  Call = "write"
	Rename Call = "rename"
	// Space is the question how much is free; none is, where it fails.
	Space Call = "space"
)

// Fail makes the calls fail on files whose paths have part in them.
func (d *Disk) Fail(call Call, part string, errno syscall.Errno) {
	ginkgo.GinkgoHelper()
	d.rule(fmt.Sprintf("%s %s %d", call, part, int(errno)))
}

// Kill ends the server like a power cut at the first of such calls, before it
// is done.
func (d *Disk) Kill(call Call, part string) {
	ginkgo.GinkgoHelper()
	d.rule(fmt.Sprintf("%s %s kill", call, part))
}

func (d *Disk) rule(rule string) {
	ginkgo.GinkgoHelper()
	next := d.control + ".next"
	Expect(os.WriteFile(next, []byte(rule), 0o644)).To(Succeed()) //nolint:gosec // the server may be another user's
	Expect(os.Rename(next, d.control)).To(Succeed())
}

// Mend makes the disk work again.
func (d *Disk) Mend() {
	ginkgo.GinkgoHelper()
	Expect(os.Remove(d.control)).To(Succeed())
}
