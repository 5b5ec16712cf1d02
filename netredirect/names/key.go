package names

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/miekg/dns"
)

const (
	maxKeyFile = 64 << 10
	maxSecret  = 512 // bytes; longer than any HMAC block
)

// algorithms maps the names that BIND has for them to those in messages.
var algorithms = map[string]string{
	"hmac-sha1":   dns.HmacSHA1,
	"hmac-sha224": dns.HmacSHA224,
	"hmac-sha256": dns.HmacSHA256,
	"hmac-sha384": dns.HmacSHA384,
	"hmac-sha512": dns.HmacSHA512,
}

// Key is a TSIG key. Printing it does not show the secret.
type Key struct {
	Name      string // canonical
	Algorithm string // canonical, as in "hmac-sha256."
	secret    string // base64
}

// String returns the name and the algorithm.
func (k Key) String() string {
	return strings.TrimSuffix(k.Name, ".") + " (" + strings.TrimSuffix(k.Algorithm, ".") + ")"
}

// GoString is String, for %#v.
func (k Key) GoString() string { return k.String() }

// LoadKey reads the one TSIG key of a file as tsig-keygen prints it:
//
//	key "name" {
//		algorithm hmac-sha256;
//		secret "base64";
//	};
//
// with comments as BIND has them. A file that everybody can read is refused.
func LoadKey(path string) (Key, error) {
	// Without O_NONBLOCK a FIFO would hold the program up here.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return Key{}, fmt.Errorf("open TSIG key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Key{}, fmt.Errorf("open TSIG key: %w", err)
	}
	if !info.Mode().IsRegular() {
		return Key{}, fmt.Errorf("TSIG key %s is not a regular file", path)
	}
	if info.Mode().Perm()&0o007 != 0 {
		return Key{}, fmt.Errorf("TSIG key %s is open to everybody (mode %04o): chmod 0600 %s, and make a new key if others may have read it",
			path, info.Mode().Perm(), path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return Key{}, fmt.Errorf("read TSIG key: %w", err)
	}
	if len(b) > maxKeyFile {
		return Key{}, fmt.Errorf("TSIG key %s is larger than %d bytes", path, maxKeyFile)
	}
	k, err := parseKey(string(b))
	if err != nil {
		return Key{}, fmt.Errorf("TSIG key %s: %w: tsig-keygen prints a valid one", path, err)
	}
	return k, nil
}

// parseKey reads one key statement, of BIND's grammar.
func parseKey(s string) (Key, error) {
	tokens, err := tokenize(s)
	if err != nil {
		return Key{}, err
	}
	p := keyParser{tokens: tokens}
	p.expect("key")
	name := p.value("name")
	p.expect("{")
	var k Key
	for p.err == nil && !p.accept("}") {
		switch clause := p.next(); {
		case clause.is("algorithm") && k.Algorithm == "":
			k.Algorithm = p.algorithm()
		case clause.is("secret") && k.secret == "":
			k.secret = p.secret()
		case p.err == nil:
			p.err = errors.New("something else than one algorithm and one secret is in it")
		}
		p.expect(";")
	}
	p.expect(";")
	switch {
	case p.err != nil:
		return Key{}, p.err
	case len(p.tokens) > 0:
		return Key{}, errors.New("something follows the key, where one key is expected")
	case k.Algorithm == "":
		return Key{}, errors.New("the key has no algorithm")
	case k.secret == "":
		return Key{}, errors.New("the key has no secret")
	}
	k.Name, err = canonical(name)
	if err != nil {
		return Key{}, fmt.Errorf("name of the key: %w", err)
	}
	return k, nil
}

// token is a word, a quoted string or one of the characters { } ;
type token struct {
	text   string
	quoted bool
}

func (t token) is(text string) bool { return !t.quoted && t.text == text }

// punctuation ends a word and cannot be a value.
const punctuation = "{};"

// tokenize splits a file of BIND's syntax, without its comments.
func tokenize(s string) ([]token, error) {
	var tokens []token
	for s != "" {
		switch {
		case strings.ContainsRune(" \t\r\n", rune(s[0])):
			s = s[1:]
		case s[0] == '#', strings.HasPrefix(s, "//"):
			_, s, _ = strings.Cut(s, "\n")
		case strings.HasPrefix(s, "/*"):
			_, rest, ended := strings.Cut(s[2:], "*/")
			if !ended {
				return nil, errors.New("a comment does not end")
			}
			s = rest
		case s[0] == '"':
			text, rest, ended := strings.Cut(s[1:], `"`)
			if !ended || strings.ContainsAny(text, "\n\\") {
				return nil, errors.New("a quoted string does not end in its line, or has a backslash")
			}
			tokens = append(tokens, token{text, true})
			s = rest
		case strings.ContainsRune(punctuation, rune(s[0])):
			tokens = append(tokens, token{text: s[:1]})
			s = s[1:]
		default:
			n := 1
			for n < len(s) && !strings.ContainsRune(" \t\r\n\"#"+punctuation, rune(s[n])) &&
				!strings.HasPrefix(s[n:], "//") && !strings.HasPrefix(s[n:], "/*") {
				n++
			}
			tokens = append(tokens, token{text: s[:n]})
			s = s[n:]
		}
	}
	return tokens, nil
}

// keyParser takes tokens until its first error.
type keyParser struct {
	tokens []token
	err    error
}

func (p *keyParser) next() token {
	if p.err != nil {
		return token{}
	}
	if len(p.tokens) == 0 {
		p.err = errors.New("the file ends within the key")
		return token{}
	}
	t := p.tokens[0]
	p.tokens = p.tokens[1:]
	return t
}

func (p *keyParser) accept(text string) bool {
	if p.err != nil || len(p.tokens) == 0 || !p.tokens[0].is(text) {
		return false
	}
	p.tokens = p.tokens[1:]
	return true
}

func (p *keyParser) expect(text string) {
	// What is there instead is not shown: it might be the secret.
	if t := p.next(); p.err == nil && !t.is(text) {
		p.err = fmt.Errorf("%q is missing", text)
	}
}

func (p *keyParser) value(what string) string {
	t := p.next()
	if p.err == nil && (t.text == "" || !t.quoted && strings.Contains(punctuation, t.text)) {
		p.err = fmt.Errorf("the %s is missing", what)
	}
	return t.text
}

func (p *keyParser) algorithm() string {
	name := strings.ToLower(p.value("algorithm"))
	known, ok := algorithms[name]
	if p.err == nil && !ok {
		p.err = fmt.Errorf("algorithm %q is none of hmac-sha256, -sha384, -sha512, -sha224, -sha1", name)
	}
	return known
}

func (p *keyParser) secret() string {
	s := p.value("secret")
	if p.err != nil {
		return ""
	}
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) == 0 || len(b) > maxSecret {
		p.err = fmt.Errorf("the secret is not base64 of 1 to %d bytes", maxSecret)
	}
	return s
}
