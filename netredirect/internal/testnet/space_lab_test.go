//go:build lab

package testnet

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestNothingIsLeft runs itself in processes that end in every way, each with a
// program in a space, and looks for that program.
func TestNothingIsLeft(t *testing.T) {
	const role = "WANMIG_TESTNET_END"
	ends := map[string]func(t *testing.T){
		"passes":            func(*testing.T) {},
		"fails":             func(t *testing.T) { t.Fatal("as it should") },
		"panics":            func(*testing.T) { panic("as it should") },
		"panics elsewhere":  func(*testing.T) { go panic("as it should"); select {} },
		"panics in a space": func(t *testing.T) { Here(t).Run(func() error { panic("as it should") }) },
		"exits":             func(*testing.T) { os.Exit(3) },
		"is killed":         func(*testing.T) { unix.Kill(os.Getpid(), unix.SIGKILL) },
	}
	if end, ok := ends[os.Getenv(role)]; ok {
		s := New(t, "host")
		s.Start(exec.Command("sleep", "1000"))
		fmt.Println(s.Sh("readlink /proc/self/ns/net"))
		end(t)
		return
	}
	for name := range ends {
		t.Run(name, func(t *testing.T) {
			child := exec.Command("/proc/self/exe", "-test.run", "^TestNothingIsLeft$")
			child.Env = append(os.Environ(), role+"="+name)
			out, err := child.CombinedOutput()
			if (err == nil) != (name == "passes") {
				t.Errorf("%v: %s", err, out)
			}
			ns := regexp.MustCompile(`net:\[[0-9]+]`).FindString(string(out))
			if ns == "" {
				t.Fatalf("it has had no namespace: %s", out)
			}
			for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				left := processesIn(t, ns)
				if len(left) == 0 {
					return
				}
				if time.Now().After(end) {
					t.Fatalf("in %s are left: %q", ns, left)
				}
			}
		})
	}
}

func processesIn(t *testing.T, ns string) (found []string) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil || len(links) == 0 {
		t.Fatalf("no processes: %v", err)
	}
	for _, link := range links {
		if to, _ := os.Readlink(link); to == ns { // some have ended
			found = append(found, link)
		}
	}
	return found
}

// TestSpacesAreApart has two of one name, and a test's own.
func TestSpacesAreApart(t *testing.T) {
	a, b := New(t, "host"), New(t, "host")
	Join(a, "eth0", b, "eth0")
	a.Sh("ip addr add 192.0.2.1/24 dev eth0")
	if out, err := a.Try("ping -c 1 -W 0.1 192.0.2.2"); err == nil {
		t.Errorf("someone answers: %s", out)
	}
	b.Sh("ip addr add 192.0.2.2/24 dev eth0")
	a.Sh("ping -c 1 -W 5 192.0.2.2")
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if here := Here(t).Sh("readlink /proc/self/ns/net"); err != nil || here != before+"\n" || here == a.Sh("readlink /proc/self/ns/net") {
		t.Errorf("here is %q, and was %q, %v", here, before, err)
	}
}

func TestFatalInASpaceIsAnError(t *testing.T) {
	err := Here(t).Run(func() error {
		runtime.Goexit()
		return nil
	})
	if err == nil {
		t.Error("it goes on as if nothing had happened")
	}
}
