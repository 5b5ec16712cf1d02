package tunnel

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/quic-go/quic-go"
)

func TestQlogOfAConnection(t *testing.T) {
	idA, idB := testIdentity(t), testIdentity(t)
	folder := filepath.Join(t.TempDir(), "new", "qlog")
	book := &logBook{}
	a, err := ListenWith("127.0.0.1:0", idA, only(idB.ID()), book.logger(), Options{Qlog: folder})
	if err != nil {
		t.Fatal(err)
	}
	b, _ := listen(t, "127.0.0.1:0", idB, only(idA.ID()))
	from, to := connectOver(t, a, b, QUIC)
	exchange(t, from, to)
	from.Close("done")
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(folder, "*-dialled.sqlog"))
	if err != nil || len(files) == 0 {
		t.Fatalf("files %v, %v", files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	records := bytes.Split(text, []byte{0x1e})[1:] // RFC 7464
	packets := 0
	for _, r := range records {
		var event struct{ Name string }
		if err := json.Unmarshal(r, &event); err != nil {
			t.Fatalf("%q: %v", r, err)
		}
		if event.Name == "transport:packet_sent" {
			packets++
		}
	}
	if packets < 3 {
		t.Errorf("%d packets in %d records: %.2000s", packets, len(records), text)
	}
}

func TestQlogIsBounded(t *testing.T) {
	folder := t.TempDir()
	q, err := openQlogFolder(folder)
	if err != nil {
		t.Fatal(err)
	}
	w, err := q.create(true, quic.ConnectionIDFromBytes([]byte{1, 2, 3, 4}))
	if err != nil {
		t.Fatal(err)
	}
	piece := make([]byte, 1<<20)
	for range 2 * QlogSize >> 20 {
		if n, err := w.Write(piece[:len(piece)-1]); n != len(piece)-1 || err != nil {
			t.Fatal(n, err)
		}
	}
	w.Write([]byte("late")) // would fit again
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(folder, "01020304-dialled.sqlog")
	info, err := os.Stat(path)
	if err != nil || info.Size() != QlogSize>>20*(1<<20-1) || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	for i := range QlogFiles - 1 {
		if err := os.WriteFile(filepath.Join(folder, strconv.Itoa(i)+".sqlog"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := q.create(false, quic.ConnectionIDFromBytes([]byte{5})); err == nil {
		t.Error("a file too many")
	}
	if none, err := openQlogFolder(""); none != nil || err != nil {
		t.Errorf("no folder: %v, %v", none, err)
	}
	if _, err := openQlogFolder(path); err == nil {
		t.Error("a file is taken for a folder")
	}
}
