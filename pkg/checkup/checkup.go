// Package checkup runs an operator's checks and describes their results.
package checkup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
)

// Status is the outcome of a check.
type Status string

// The values of Status.
const (
	OK Status = "ok"
	// Warning does not prevent the delivery.
	Warning Status = "warning"
	Failed  Status = "failed"
	// Skipped checks did not run, because another check has failed.
	Skipped Status = "skipped"
)

// Result is one result of a check.
type Result struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	// Detail says what was found.
	Detail string `json:"detail"`
	// Remedy says what the operator has to do. It is empty if there is nothing to do.
	Remedy string `json:"remedy,omitempty"`
}

// Check is a check of one property, or of several properties that belong together.
type Check struct {
	Name string
	// Needs are the names of the checks without which this check is skipped.
	Needs []string
	// Run returns what it has found. The errors of errors.Join are results of their own.
	// An error that has a method Explain has a remedy.
	Run func(ctx context.Context) (detail string, err error)
	// Remedy is the remedy for errors that have none.
	Remedy string
}

// WithRemedy sets the remedy of the checks that have none, and returns the checks.
func WithRemedy(remedy string, checks []Check) []Check {
	for i := range checks {
		checks[i].Remedy = cmp.Or(checks[i].Remedy, remedy)
	}
	return checks
}

// Remediable is an error for which a remedy exists.
type Remediable interface {
	error
	// Explain returns the problem as a sentence, and the remedy.
	Explain() (problem, remedy string)
}

// ProblemError is an error with a remedy.
type ProblemError struct{ Problem, Remedy string }

// Error implements error.
func (e *ProblemError) Error() string { return e.Problem + "; to fix it: " + e.Remedy }

// Explain implements Remediable.
func (e *ProblemError) Explain() (problem, remedy string) { return e.Problem, e.Remedy }

// Warn returns an error that is a warning.
func Warn(problem, remedy string) error { return &warning{ProblemError{problem, remedy}} }

type warning struct{ ProblemError }

// Skip returns an error with which a check says that it did not run.
func Skip(reason string) error { return skipped{reason} }

type skipped struct{ reason string }

// Error implements error.
func (s skipped) Error() string { return s.reason }

// Runner runs checks one after the other. The zero value is ready to use.
type Runner struct {
	// Report receives each result.
	Report func(Result)

	missing map[string]string // why the checks that need a check are skipped
	counts  map[Status]int
}

// Run runs the checks. If ctx has ended, it skips the others.
func (r *Runner) Run(ctx context.Context, checks ...Check) {
	for _, check := range checks {
		r.run(ctx, check)
	}
}

func (r *Runner) run(ctx context.Context, check Check) {
	for _, need := range check.Needs {
		if reason, ok := r.missing[need]; ok {
			r.skip(check.Name, reason)
			return
		}
	}
	if isInterrupted(ctx) {
		r.skip(check.Name, interrupted)
		return
	}
	detail, err := check.Run(ctx)
	if err != nil && isInterrupted(ctx) { // the interruption may be the cause
		r.skip(check.Name, interrupted)
		return
	}
	problems := flatten(err)
	if len(problems) == 0 {
		r.report(Result{Name: check.Name, Status: OK, Detail: detail})
		return
	}
	for _, problem := range problems {
		result := describe(check, problem)
		switch result.Status {
		case Failed:
			r.miss(check.Name, check.Name+" has failed")
		case Skipped:
			r.miss(check.Name, check.Name+" was skipped")
		default:
		}
		r.report(result)
	}
}

const interrupted = "interrupted"

func isInterrupted(ctx context.Context) bool { return errors.Is(ctx.Err(), context.Canceled) }

func (r *Runner) skip(name, reason string) {
	r.miss(name, reason)
	r.report(Result{Name: name, Status: Skipped, Detail: reason})
}

// miss records why the checks that need the named check are skipped.
func (r *Runner) miss(name, reason string) {
	if r.missing == nil {
		r.missing = map[string]string{}
	}
	r.missing[name] = reason
}

func (r *Runner) report(result Result) {
	if r.counts == nil {
		r.counts = map[Status]int{}
	}
	r.counts[result.Status]++
	r.Report(result)
}

// Count returns the number of results with the status.
func (r *Runner) Count(status Status) int { return r.counts[status] }

// flatten returns the errors of errors.Join.
func flatten(err error) (all []error) {
	joined, ok := err.(interface{ Unwrap() []error })
	switch {
	case err == nil:
		return nil
	case !ok:
		return []error{err}
	}
	for _, err := range joined.Unwrap() {
		all = append(all, flatten(err)...)
	}
	return all
}

func describe(check Check, err error) Result {
	if reason, ok := errors.AsType[skipped](err); ok {
		return Result{Name: check.Name, Status: Skipped, Detail: reason.Error()}
	}
	result := Result{Name: check.Name, Status: Failed, Detail: err.Error(), Remedy: check.Remedy}
	if remediable, ok := errors.AsType[Remediable](err); ok {
		result.Detail, result.Remedy = remediable.Explain()
	}
	if _, ok := errors.AsType[*warning](err); ok {
		result.Status = Warning
	}
	return result
}

// NoResponse returns the problem of a server that does not respond in time.
func NoResponse(server, key string) error {
	return &ProblemError{
		Problem: fmt.Sprintf("no response from %s within the time limit", server),
		Remedy:  fmt.Sprintf("check the firewalls and the network between this machine and the server, and %s; --timeout allows a longer wait", key),
	}
}
