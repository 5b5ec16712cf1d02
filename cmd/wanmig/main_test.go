package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"wanmig": main})
}

// TestScripts runs the command against an agent that answers as the scripts
// say, on a unix socket. Commands of the scripts, besides testscript's own:
//
//	serve FILE        starts the agent, which answers as FILE says (see cannedAgent)
//	exits CODE CMD…   runs CMD, which must exit with CODE
//
// What the agent is sent in bodies is appended to the file "sent".
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("WANMIG_AGENT", filepath.Join(env.WorkDir, "agent.sock"))
			env.Setenv("TZ", "UTC")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"serve": func(ts *testscript.TestScript, _ bool, args []string) {
				a, err := startCannedAgent(ts.Getenv("WANMIG_AGENT"), ts.ReadFile(args[0]), ts.MkAbs("sent"))
				ts.Check(err)
				ts.Defer(a.stop)
			},
			"exits": func(ts *testscript.TestScript, _ bool, args []string) {
				want, err := strconv.Atoi(args[0])
				ts.Check(err)
				got := 0
				if err := ts.Exec(args[1], args[2:]...); err != nil {
					exit, ok := err.(*exec.ExitError)
					if !ok {
						ts.Fatalf("%v", err)
					}
					got = exit.ExitCode()
				}
				if got != want {
					ts.Fatalf("exit code %d, want %d", got, want)
				}
			},
		},
	})
}

// command prepares the command as its own process, with the agent at socket.
func command(socket string, args ...string) *exec.Cmd {
	cmd := exec.Command("wanmig", args...)
	cmd.Env = append(os.Environ(), "WANMIG_AGENT="+socket, "TERM=xterm", "LANG=C.UTF-8", "LC_ALL=", "NO_COLOR=1")
	return cmd
}
