package users

import "testing"

func BenchmarkParseNewUser(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseNewUser("Ada.Lovelace@example.com", "Ada", "Lovelace"); err != nil {
			b.Fatal(err)
		}
	}
}
