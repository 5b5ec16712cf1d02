package main

import (
	"errors"
	"testing"

	"github.com/wanmig/wanmig/lab"
)

func TestParseDownload(t *testing.T) {
	for text, want := range map[string]lab.DownloadOptions{
		"64":         {MiB: 64},
		"512,2MiB/s": {MiB: 512, Limit: 2 << 20},
		"1,100kB":    {MiB: 1, Limit: 100e3},
	} {
		if got, err := parseDownload(text); err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "64MiB", ",", "64,", "64,fast", "x,1MiB", "99999999999999999999"} {
		if got, err := parseDownload(text); err == nil {
			t.Errorf("%q was read as %+v", text, got)
		}
	}
}

func FuzzParseDownload(f *testing.F) {
	for _, seed := range []string{"64", "512,2MiB/s", ",", "1,/s"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if o, err := parseDownload(s); err == nil && o.Limit < 0 {
			t.Errorf("%q was read as %+v", s, o)
		}
	})
}

func TestJudgeNamesEveryFlowThatIsNotWell(t *testing.T) {
	well := map[string]result{"udp": lab.UDPResult{Sent: 2, Answered: 1, Lost: 1}, "ssh": lab.SSHResult{Lines: 3}}
	if err := judge(well); err != nil {
		t.Error(err)
	}
	well["stream"] = lab.StreamResult{Sent: 2, Answered: 1, Broken: "gone"}
	well["download"] = lab.DownloadResult{Size: 9, Bytes: 5, Wrong: 2, FirstWrong: 3}
	want := errors.New("download: 2 of 5 bytes are wrong, the first at 3; stream: the connection broke with 1 of 2 records answered: gone")
	if err := judge(well); err == nil || err.Error() != want.Error() {
		t.Errorf("got %v, want %v", err, want)
	}
}
