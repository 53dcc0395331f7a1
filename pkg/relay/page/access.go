package page

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"
)

const (
	sessionCookie = "diehard_session"
	// sessionTime is the time after which an operator logs in again.
	sessionTime = 12 * time.Hour
	maxName     = 64 // bytes of an operator's name
	maxForm     = 64 << 10
)

// access decides who may see the page. With a token, an operator logs in with the token
// and a name, which the audit table records. Without a token, the page serves only a
// listener on a loopback address.
type access struct {
	token    string
	loopback bool // the listener's address is a loopback address
}

// Serves returns whether a relay that listens on this address serves the page.
func Serves(addr, token string) bool { return token != "" || isLoopback(addr) }

// isLoopback returns whether the host of an address, which can have a port, is this
// machine.
func isLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		host = strings.Trim(addr, "[]")
	}
	ip := net.ParseIP(host)
	return strings.EqualFold(host, "localhost") || ip != nil && ip.IsLoopback()
}

type operatorKey struct{}

// operator returns the operator of a request, for the audit table: a name and an address.
func operator(r *http.Request) string {
	name, _ := r.Context().Value(operatorKey{}).(string)
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		host = r.RemoteAddr
	}
	return name + "@" + host
}

// require passes a request of an operator to next, and sends everybody else to the login.
func (a access) require(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := "operator"
		if a.token == "" {
			// The check of the host prevents a page of another site from reading this page after
			// its name was rebound to 127.0.0.1.
			if !a.loopback || !isLoopback(r.Host) {
				http.Error(w, "This page is only for localhost. Set admin.token to reach it by another name.", http.StatusForbidden)
				return
			}
		} else {
			cookie, err := r.Cookie(sessionCookie)
			if err == nil {
				name, err = a.verify(cookie.Value, time.Now())
			}
			if err != nil {
				if r.Method == http.MethodGet && r.URL.Path != livePath {
					http.Redirect(w, r, "/login", http.StatusSeeOther)
					return
				}
				http.Error(w, "Log in first.", http.StatusUnauthorized)
				return
			}
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), operatorKey{}, name)))
	})
}

// isToken compares in constant time.
func (a access) isToken(given string) bool {
	want, got := sha256.Sum256([]byte(a.token)), sha256.Sum256([]byte(given))
	return subtle.ConstantTimeCompare(want[:], got[:]) == 1
}

// session returns the value of a cookie. Every relay with the same token accepts it, so
// the page works behind a load balancer.
func (a access) session(name string, now time.Time) string {
	claim := base64.RawURLEncoding.EncodeToString([]byte(name)) + "." + strconv.FormatInt(now.Add(sessionTime).Unix(), 10)
	return claim + "." + a.sign(claim)
}

func (a access) sign(claim string) string {
	mac := hmac.New(sha256.New, []byte(a.token))
	mac.Write([]byte("diehard relay session\n" + claim))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// verify returns the operator's name of a session that has not ended.
func (a access) verify(session string, now time.Time) (string, error) {
	end := strings.LastIndexByte(session, '.')
	if end < 0 || !hmac.Equal([]byte(a.sign(session[:end])), []byte(session[end+1:])) {
		return "", http.ErrNoCookie
	}
	encoded, until, _ := strings.Cut(session[:end], ".")
	seconds, err := strconv.ParseInt(until, 10, 64)
	if err != nil || now.Unix() >= seconds {
		return "", http.ErrNoCookie
	}
	name, err := base64.RawURLEncoding.DecodeString(encoded)
	return string(name), err
}

func (p *Page) showLogin(w http.ResponseWriter, r *http.Request) {
	if p.access.token == "" {
		http.Redirect(w, r, "/", http.StatusSeeOther)
		return
	}
	p.render(w, r, http.StatusOK, "login", loginView{})
}

type loginView struct{ Name, Error string }

func (p *Page) login(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimSpace(r.PostFormValue("name"))
	view := loginView{Name: name}
	switch {
	case p.access.token == "":
		http.Redirect(w, r, "/", http.StatusSeeOther)
		return
	case name == "" || len(name) > maxName || strings.ContainsFunc(name, func(c rune) bool { return !unicode.IsPrint(c) }):
		view.Error = "Enter your name, at most 64 bytes. The audit table records it with your actions."
	case !p.access.isToken(r.PostFormValue("token")):
		p.log.WarnContext(r.Context(), "login refused", "name", name, "remote", r.RemoteAddr)
		view.Error = "This is not the token."
	}
	if view.Error != "" {
		p.render(w, r, http.StatusUnprocessableEntity, "login", view)
		return
	}
	p.setSession(w, r, p.access.session(name, time.Now()), int(sessionTime/time.Second))
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

func (p *Page) logout(w http.ResponseWriter, r *http.Request) {
	p.setSession(w, r, "", -1)
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}

func (p *Page) setSession(w http.ResponseWriter, r *http.Request, value string, maxAge int) {
	http.SetCookie(w, &http.Cookie{ //nolint:gosec // Secure is set behind TLS
		Name: sessionCookie, Value: value, Path: "/", MaxAge: maxAge, HttpOnly: true, SameSite: http.SameSiteStrictMode,
		// The relay serves plain HTTP. A proxy that ends TLS says so.
		Secure: r.Header.Get("X-Forwarded-Proto") == "https",
	})
}

// withHeaders sets the headers that keep other sites and caches away.
func withHeaders(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Content-Security-Policy",
			"default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'")
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("Referrer-Policy", "same-origin")
		header.Set("Cross-Origin-Opener-Policy", "same-origin")
		header.Set("Cache-Control", "no-store")
		r.Body = http.MaxBytesReader(w, r.Body, maxForm)
		next.ServeHTTP(w, r)
	})
}
