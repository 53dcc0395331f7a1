package users

import "testing"

func BenchmarkValidate(b *testing.B) {
	n := NewUser{Email: "Ada.Lovelace@example.com", FirstName: "Ada", LastName: "Lovelace"}
	b.ReportAllocs()
	for b.Loop() {
		if err := n.Validate(); err != nil {
			b.Fatal(err)
		}
	}
}
