package postgres

// Dial is what every connection is dialed with.
var Dial = dialer{}.DialContext
