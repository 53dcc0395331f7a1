package chserver

import (
	"crypto/subtle"

	"github.com/ClickHouse/ch-go/proto"
)

// defaultUser is the user of a client that sends no name.
const defaultUser = "default"

// credentials holds the name and the password of this server's only user.
type credentials struct {
	user, password string
}

func newCredentials(user, password string) credentials {
	if user == "" {
		user = defaultUser
	}
	return credentials{user: user, password: password}
}

// check compares the credentials with the credentials of a client.
func (c credentials) check(user, password string) error {
	if user == "" {
		user = defaultUser
	}
	userOK := subtle.ConstantTimeCompare([]byte(user), []byte(c.user))
	passwordOK := subtle.ConstantTimeCompare([]byte(password), []byte(c.password))
	if userOK&passwordOK == 1 {
		return nil
	}
	return newException(proto.ErrAuthenticationFailed, "AUTHENTICATION_FAILED",
		"%s: Authentication failed: password is incorrect, or there is no user with such name.", user)
}
