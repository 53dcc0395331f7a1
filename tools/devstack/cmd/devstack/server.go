package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

const (
	signalsHelp = "SIGTERM and SIGINT stop the server cleanly. SIGQUIT ends it as in a crash; with --data-dir it can be\n" +
		"started again on the same data."
	attachedUsage = "stop when the standard input ends: the program that holds it has ended, in whatever way"
)

// server is what both engines have in common.
type server interface {
	Done() <-chan struct{}
	Kill() error
	Stop() error
}

// runServer prints where the server is, and stops it when ctx ends or kills it when
// crashed is closed.
func runServer(ctx context.Context, crashed <-chan struct{}, s server, addresses map[string]string) error {
	line, err := json.Marshal(addresses)
	if err != nil {
		return err //nolint:wrapcheck // cannot happen with this type
	}
	fmt.Println(string(line)) //nolint:forbidigo // what the caller waits for
	select {
	case <-ctx.Done():
	case <-crashed:
		err = s.Kill()
	case <-s.Done():
		err = errServerEnded
	}
	return errors.Join(err, s.Stop())
}

var errServerEnded = errors.New("the server has ended by itself")

// whileWanted returns a context that ends when nobody needs the server any more, and a
// channel that is closed when it is to be ended as in a crash.
func whileWanted(ctx context.Context, attached bool) (wanted context.Context, crashed <-chan struct{}, stop func()) {
	wanted, cancel := context.WithCancel(ctx)
	if attached {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			cancel()
		}()
	}
	quit, crash := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(quit, syscall.SIGQUIT)
	go func() {
		select {
		case <-quit:
			close(crash)
		case <-wanted.Done():
		}
	}()
	return wanted, crash, func() {
		signal.Stop(quit)
		cancel()
	}
}
