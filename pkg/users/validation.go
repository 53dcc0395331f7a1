package users

import "strings"

// ValidationError lists all rules that the caller's values break.
type ValidationError struct {
	Fields []FieldError
}

// FieldError is one broken rule.
type FieldError struct {
	// Field is the name of the value: email, first_name, last_name, limit, cursor.
	Field string
	// Reason completes a sentence that begins with the name of the field. It does
	// not contain the value.
	Reason string
}

// Error implements error. The text contains no values.
func (e *ValidationError) Error() string {
	reasons := make([]string, len(e.Fields))
	for i, f := range e.Fields {
		reasons[i] = f.Field + " " + f.Reason
	}
	return strings.Join(reasons, "; ")
}

// validation collects broken rules.
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
