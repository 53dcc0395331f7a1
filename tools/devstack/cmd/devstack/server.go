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
	signalsHelp = "SIGTERM and SIGINT stop the server cleanly. SIGQUIT ends it like a crash. A server with --data-dir\n" +
		"can be started again on the same data."
	attachedUsage = "stop when standard input is closed; the system closes it when the calling program ends, even after a crash"
)

// server has the methods of both engines that the commands need.
type server interface {
	Done() <-chan struct{}
	Kill() error
	Stop() error
}

// runServer prints the addresses of the server. It stops the server when ctx
// ends, and kills it when crashed is closed.
func runServer(ctx context.Context, crashed <-chan struct{}, s server, addresses map[string]string) error {
	line, err := json.Marshal(addresses)
	if err != nil {
		return err //nolint:wrapcheck // cannot happen with this type
	}
	fmt.Println(string(line)) //nolint:forbidigo // the caller waits for this line
	select {
	case <-ctx.Done():
	case <-crashed:
		err = s.Kill()
	case <-s.Done():
		err = errServerEnded
	}
	return errors.Join(err, s.Stop())
}

var errServerEnded = errors.New("the server ended unexpectedly")

// whileWanted returns a context that ends when the server must stop, and a channel that
// is closed when the server must be killed like in a crash.
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
