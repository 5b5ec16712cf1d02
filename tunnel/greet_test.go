package tunnel

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"
)

var someToken = token{1, 2, 3, 15: 16}

var hellos = []hello{
	{},
	{token: someToken, carrier: 7, outage: 10 * time.Minute, port: 7421, transport: TCP},
	{token: token{15: 255}, carrier: 1<<32 - 1, outage: (1<<32 - 1) * time.Second, port: 65535},
}

var answers = []answer{{}, {welcome, someToken}, {noSession, someToken}, {busy, token{}}, {crowded, someToken}, {255, someToken}}

// later is a greeting with bytes of a later version at its end.
func later(b []byte, n int) []byte {
	b = append(bytes.Clone(b), make([]byte, n)...)
	size := len(b) - greetHead
	b[0], b[1], b[2] = 9, byte(size>>8), byte(size)
	return b
}

func TestGreetingsRoundTrip(t *testing.T) {
	for _, h := range hellos {
		for _, b := range [][]byte{h.append(nil), later(h.append(nil), 1), later(h.append(nil), maxGreeting-helloSize)} {
			r := bytes.NewReader(append(b, "frames"...))
			got, err := readHello(r)
			if err != nil || got != h || r.Len() != len("frames") {
				t.Errorf("%+v comes back as %+v, %v, with %d bytes left", h, got, err, r.Len())
			}
		}
	}
	for _, a := range answers {
		for _, b := range [][]byte{a.append(nil), later(a.append(nil), 1), later(a.append(nil), maxGreeting-answerSize)} {
			r := bytes.NewReader(append(b, "frames"...))
			got, err := readAnswer(r)
			if err != nil || got != a || r.Len() != len("frames") {
				t.Errorf("%+v comes back as %+v, %v, with %d bytes left", a, got, err, r.Len())
			}
		}
	}
	if err := readConfirmation(bytes.NewReader([]byte{confirmation})); err != nil {
		t.Error(err)
	}
}

func TestGreetingsCutShort(t *testing.T) {
	for _, test := range []struct {
		whole []byte
		read  func(io.Reader) error
	}{
		{hellos[1].append(nil), func(r io.Reader) error { _, err := readHello(r); return err }},
		{answers[1].append(nil), func(r io.Reader) error { _, err := readAnswer(r); return err }},
		{[]byte{confirmation}, readConfirmation},
	} {
		for n := range test.whole {
			if err := test.read(bytes.NewReader(test.whole[:n])); !errors.Is(err, errIncomplete) || !errors.Is(err, ErrFormat) {
				t.Errorf("%d of %d bytes: %v", n, len(test.whole), err)
			}
		}
	}
}

func TestGreetingsOfWrongFormat(t *testing.T) {
	old := hellos[1].append(nil)
	old[0] = 0
	short := hellos[1].append(nil)
	short[2]--
	strange := hello{transport: TCP + 1}.append(nil)
	for name, b := range map[string][]byte{
		"version 0": old,
		"transport": strange,
		"too short": short,
		"too long":  later(hellos[1].append(nil), maxGreeting-helloSize+1),
		"TLS":       {22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3},
		"HTTP":      []byte("GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"),
	} {
		if h, err := readHello(bytes.NewReader(b)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %+v, %v", name, h, err)
		}
	}
	if err := readConfirmation(bytes.NewReader([]byte{0})); !errors.Is(err, ErrFormat) {
		t.Errorf("another byte than the confirmation: %v", err)
	}
}

func TestAnswersToADialer(t *testing.T) {
	for a, want := range map[status]error{welcome: nil, noSession: errNoSession, busy: ErrBusy, crowded: errTooMany, 4: ErrVersion, 255: ErrVersion} {
		if err := (answer{status: a}).err(); !errors.Is(err, want) {
			t.Errorf("answer %d: %v, want %v", a, err, want)
		}
	}
}

func FuzzGreetings(f *testing.F) {
	for _, h := range hellos {
		f.Add(h.append(nil))
	}
	for _, a := range answers {
		f.Add(a.append(nil))
	}
	f.Add([]byte{1, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := readHello(bytes.NewReader(b)); err == nil {
			again, err := readHello(bytes.NewReader(h.append(nil)))
			if err != nil || again != h {
				t.Errorf("%+v comes back as %+v, %v", h, again, err)
			}
		} else if !errors.Is(err, ErrFormat) {
			t.Error(err)
		}
		if a, err := readAnswer(bytes.NewReader(b)); err == nil {
			again, err := readAnswer(bytes.NewReader(a.append(nil)))
			if err != nil || again != a {
				t.Errorf("%+v comes back as %+v, %v", a, again, err)
			}
		} else if !errors.Is(err, ErrFormat) {
			t.Error(err)
		}
	})
}
