package api

import (
	"errors"
	"testing"
)

func TestEchoRoundTrip(t *testing.T) {
	r := EchoRecord{Breaks: 1, Sequence: 1 << 60, Count: 3, Stamp: 4}
	b := r.Append(nil)
	if len(b) != EchoSize {
		t.Fatalf("a record has %d bytes, want %d", len(b), EchoSize)
	}
	got, err := ParseEcho(b)
	if err != nil || got != r {
		t.Errorf("read %+v, %v, want %+v", got, err, r)
	}
	for n := range b {
		if _, err := ParseEcho(b[:n]); !errors.Is(err, ErrEcho) {
			t.Errorf("the first %d bytes: %v, want ErrEcho", n, err)
		}
	}
	if _, err := ParseEcho(append(b, 0)); !errors.Is(err, ErrEcho) {
		t.Errorf("a byte too many: %v, want ErrEcho", err)
	}
}

func FuzzParseEcho(f *testing.F) {
	f.Add(EchoRecord{Sequence: 1}.Append(nil))
	f.Add([]byte("wech"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseEcho(b)
		if err == nil && string(r.Append(nil)) != string(b) {
			t.Errorf("%x was read as %+v", b, r)
		}
	})
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "4096": 4096, "512KiB": 512 << 10, "20MiB/s": 20 << 20, "1GiB": 1 << 30, "2TiB": 2 << 40} {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("%q: %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "MiB", "-1", "1.5GiB", "20MB", "9999999999TiB", "9223372036854775808", "1 MiB", "1MiB/s/s"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("%q was read as %d", text, got)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, seed := range []string{"0", "20MiB/s", "8388607TiB", "99999999999999999999"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseSize(s); err == nil && n < 0 {
			t.Errorf("%q was read as %d", s, n)
		}
	})
}
