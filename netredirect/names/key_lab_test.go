//go:build lab

package names

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What BIND's own parser takes for a key is what this one takes for it.
func TestKeysAsBINDReadsThem(t *testing.T) {
	for _, s := range []string{
		generateKey(t, "wanmig.", "hmac-sha512"),
		generateKey(t, "wanmig.", "hmac-sha1"),
		"key wanmig{secret YWFh# a comment\n;algorithm hmac-sha256;};",
		"key wanmig { algorithm \"hmac-sha384\"; secret YWFh//YWFh\n; };",
		"key wanmig { algorithm hmac-sha256; secret YWFh//YWFh; };",
		"/* \" */key \"a.b\"/**/{algorithm hmac-sha224;secret \"YWFh\";};# end",
		`key wan"mig" { algorithm hmac-sha256; secret "YWFh"; };`,
		`key wanmig { algorithm hmac-sha256; secret "YWFh"; }`,
		`key wanmig { algorithm hmac-sha256; secret "YWFh" };`,
		`key wanmig { algorithm hmac-sha257; secret "YWFh"; };`,
		`key wanmig { algorithm hmac-sha256; secret "YWF"; };`,
		`key wanmig { algorithm hmac-sha256; };`,
		`key { algorithm hmac-sha256; secret "YWFh"; };`,
	} {
		path := filepath.Join(t.TempDir(), "named.conf")
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		out, refused := exec.Command("/usr/bin/named-checkconf", "-p", path).CombinedOutput()
		k, err := LoadKey(path)
		if (err != nil) != (refused != nil) {
			t.Errorf("%q: %v here, %v from BIND: %s", s, err, refused, out)
			continue
		}
		if err != nil {
			continue
		}
		for _, want := range []string{strings.TrimSuffix(k.Name, "."), strings.TrimSuffix(k.Algorithm, "."), k.secret} {
			if !strings.Contains(string(out), `"`+want+`"`) {
				t.Errorf("%q: read %v, which is not what BIND prints: %s", s, k, out)
			}
		}
	}
}
