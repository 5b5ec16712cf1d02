package names

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

const testSecret = "cbO38Zt0JqDaV3uTic3UGP1aI5o8J4Rck1B6v1L9K3k="

// As tsig-keygen of BIND 9.18 prints it.
const testKey = "key \"Wanmig\" {\n\talgorithm hmac-sha256;\n\tsecret \"" + testSecret + "\";\n};\n"

func TestParseKey(t *testing.T) {
	want := Key{Name: "wanmig.", Algorithm: "hmac-sha256.", secret: testSecret}
	for _, s := range []string{
		testKey,
		"key wanmig. { secret " + testSecret + "; algorithm \"HMAC-SHA256\"; };",
		"# from the DNS team\n// 2026\n/* { \" */key/**/\"wanmig\"{algorithm hmac-sha256;secret \"" + testSecret + "\";};# end",
		"\r\n" + strings.ReplaceAll(testKey, "\n", "\r\n"),
	} {
		got, err := parseKey(s)
		if err != nil || got != want {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
}

func TestParseKeyRefuses(t *testing.T) {
	for _, tt := range []struct{ s, want string }{
		{"", "ends"},
		{"server 10.0.0.1;", `"key" is missing`},
		{`"key" wanmig { };`, `"key" is missing`},
		{"key { algorithm hmac-sha256; };", "name is missing"},
		{`key "" { };`, "name is missing"},
		{"key wan mig { };", `"{" is missing`},
		{"key wanmig { };", "no algorithm"},
		{"key wanmig { algorithm hmac-sha256; };", "no secret"},
		{"key wanmig { secret YQ==; };", "no algorithm"},
		{"key wanmig { algorithm hmac-md5; secret YQ==; };", "none of hmac-sha256"},
		{"key wanmig { algorithm hmac-sha256-128; secret YQ==; };", "none of"},
		{"key wanmig { algorithm; secret YQ==; };", "algorithm is missing"},
		{"key wanmig { algorithm hmac-sha256 secret YQ==; };", `";" is missing`},
		{"key wanmig { algorithm hmac-sha256; algorithm hmac-sha256; secret YQ==; };", "one algorithm"},
		{"key wanmig { algorithm hmac-sha256; secret YQ==; secret YQ==; };", "one secret"},
		{"key wanmig { algorithm hmac-sha256; secret YQ; };", "base64"},
		{"key wanmig { algorithm hmac-sha256; secret YR==; };", "base64"},
		{`key wanmig { algorithm hmac-sha256; secret ""; };`, "secret is missing"},
		{"key wanmig { algorithm hmac-sha256; secret " + strings.Repeat("YWFh", 200) + "; };", "1 to 512"},
		{"key wanmig { algorithm hmac-sha256; secret YQ==; }", "ends"},
		{testKey + testKey, "one key"},
		{testKey + "x", "one key"},
		{testKey + "/* ", "comment"},
		{"key \"wanmig\n", "quoted"},
		{`key "wan\mig" { };`, "quoted"},
		{strings.Replace(testKey, "Wanmig", "a..b", 1), "no domain name"},
		{strings.Replace(testKey, "Wanmig", "a b", 1), "no domain name"},
		{strings.Replace(testKey, "Wanmig", "a\x00b", 1), "no domain name"},
		{strings.Replace(testKey, "Wanmig", ".", 1), "no domain name"},
		{strings.Replace(testKey, "Wanmig", strings.Repeat("a", 64), 1), "no domain name"},
	} {
		_, err := parseKey(tt.s)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: error %v, want %q", tt.s, err, tt.want)
		}
	}
}

func TestEveryPrefixOfAKeyFails(t *testing.T) {
	whole := strings.TrimSuffix(testKey, "\n")
	for n := range whole {
		if k, err := parseKey(whole[:n]); err == nil {
			t.Errorf("%q is taken as %v", whole[:n], k)
		}
	}
}

func TestKeyHidesItsSecret(t *testing.T) {
	k, err := parseKey(testKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{fmt.Sprint(k), fmt.Sprintf("%v %+v %#v %s %q", k, k, k, k, k), fmt.Sprintf("%+v", &k)} {
		if strings.Contains(s, testSecret[:8]) || !strings.Contains(s, "wanmig (hmac-sha256)") {
			t.Errorf("printed as %s", s)
		}
	}
	for n := range testKey {
		// A character too much, anywhere, must not print it either.
		if _, err := parseKey(testKey[:n] + ";" + testKey[n:]); err != nil && strings.Contains(err.Error(), testSecret[:8]) {
			t.Errorf("error %q", err)
		}
	}
}

func TestLoadKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wanmig.key")
	write := func(content string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(want string) {
		t.Helper()
		if _, err := LoadKey(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("error %v, want %q and the path", err, want)
		}
	}
	refused("no such file")
	for _, mode := range []os.FileMode{0o600, 0o400, 0o640} {
		write(testKey, mode)
		if k, err := LoadKey(path); err != nil || k.Name != "wanmig." {
			t.Errorf("mode %o: %v, %v", mode, k, err)
		}
	}
	for _, mode := range []os.FileMode{0o644, 0o602, 0o604} {
		write(testKey, mode)
		refused("chmod 0600 " + path)
	}
	write("nonsense", 0o600)
	refused("tsig-keygen")
	write(strings.Repeat("#", maxKeyFile+1), 0o600)
	refused("larger")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("not a regular file")
}

func FuzzParseKey(f *testing.F) {
	f.Add(testKey)
	f.Add("key a { algorithm hmac-sha1; secret YQ==; }; # x")
	f.Add("/*\"*/ key \"a\" { secret \"YQ==\" }")
	f.Fuzz(func(t *testing.T, s string) {
		k, err := parseKey(s)
		if err != nil {
			return
		}
		again, err := parseKey(fmt.Sprintf("key \"%s\" { algorithm %s; secret \"%s\"; };", k.Name, strings.TrimSuffix(k.Algorithm, "."), k.secret))
		if err != nil && !strings.Contains(k.Name, `\`) || err == nil && again != k {
			t.Errorf("%q: %v comes back as %v, %v", s, k, again, err)
		}
	})
}
