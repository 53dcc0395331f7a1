package users

import "strings"

// ValidationError says which of the values that a caller gave break a rule:
// all of them. Nothing has been read or written.
type ValidationError struct {
	Fields []FieldError
}

// FieldError is one broken rule.
type FieldError struct {
	// Field is the value's name: email, first_name, last_name, limit, cursor.
	Field string
	// Reason completes a sentence that begins with the field's name. It never
	// repeats the value.
	Reason string
}

// Error implements error. It names the fields and not their values.
func (e *ValidationError) Error() string {
	reasons := make([]string, len(e.Fields))
	for i, f := range e.Fields {
		reasons[i] = f.Field + " " + f.Reason
	}
	return strings.Join(reasons, "; ")
}

// validation collects what breaks a rule.
type validation struct {
	broken []FieldError
}

func (v *validation) check(field string, err error) {
	if err != nil {
		v.broken = append(v.broken, FieldError{Field: field, Reason: err.Error()})
	}
}

func (v *validation) err() error {
	if len(v.broken) == 0 {
		return nil
	}
	return &ValidationError{Fields: v.broken}
}
