package migrate

import (
	"encoding/json"
	"strings"
	"testing"
)

func goodDisk() wireDisk {
	return wireDisk{Target: "vda", Export: "drive-virtio-disk0", Path: "/images/a b.qcow2", Format: "qcow2", Size: 1 << 30, Allocated: 5, ClusterSize: 65536}
}

func TestValidateRefuses(t *testing.T) {
	good := prepare{Move: "mv-abcdefgh", Name: "web server", UUID: "8f5b9a3e-0c3d-4d5f-9a51-6d1a2b3c4d5e", XML: "<domain/>", Disks: []wireDisk{goodDisk()}}
	if err := good.validate(); err != nil {
		t.Fatal(err)
	}
	bad := map[string]func(*prepare){
		"move":          func(p *prepare) { p.Move = "../../etc" },
		"name":          func(p *prepare) { p.Name = "" },
		"long name":     func(p *prepare) { p.Name = strings.Repeat("x", 256) },
		"UUID":          func(p *prepare) { p.UUID = "web" }, // libvirt would be asked for the guest of that name
		"other UUID":    func(p *prepare) { p.UUID = strings.ToUpper(p.UUID) },
		"XML":           func(p *prepare) { p.XML = strings.Repeat("x", maxXML+1) },
		"persist":       func(p *prepare) { p.PersistXML = strings.Repeat("x", maxXML+1) },
		"cookie":        func(p *prepare) { p.Cookie = make([]byte, maxCookie+1) },
		"many disks":    func(p *prepare) { p.Disks = make([]wireDisk, maxDisks+1) },
		"twice":         func(p *prepare) { p.Disks = append(p.Disks, p.Disks[0]) },
		"target":        func(p *prepare) { p.Disks[0].Target = "vda/../x" },
		"export":        func(p *prepare) { p.Disks[0].Export = "a\x00b" },
		"relative path": func(p *prepare) { p.Disks[0].Path = "images/a" },
		"no path":       func(p *prepare) { p.Disks[0].Path = "" },
		"odd size":      func(p *prepare) { p.Disks[0].Size = 513 },
		"huge size":     func(p *prepare) { p.Disks[0].Size = 1 << 62 },
		"negative":      func(p *prepare) { p.Disks[0].Allocated = -1 },
		"format":        func(p *prepare) { p.Disks[0].Format = "vmdk" },
	}
	for name, spoil := range bad {
		p := good
		p.Disks = []wireDisk{goodDisk()}
		spoil(&p)
		if p.validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzControl(f *testing.F) {
	for _, body := range []any{hello{Protocol: 1, Site: "a"}, check{Name: "a", XML: "<domain/>", Disks: []wireDisk{goodDisk()}},
		prepare{Move: "mv-abcdefgh", Name: "a", Disks: []wireDisk{goodDisk()}}, offer{Cookie: []byte("c")}, running{DrainMS: 1}, reason{"r"}, query{Move: "mv-abcdefgh"},
		giveBack{Move: "mv-abcdefgh", Storage: map[string]string{"/a": "/b"}}, givenBack{"mv-abcdefgh"}} {
		b, _ := json.Marshal(body)
		f.Add(b)
	}
	f.Add([]byte(`{"disks":[{"size":-1}]}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p prepare
		if decode(b, &p) == nil && p.validate() == nil {
			for _, d := range p.Disks {
				if d.Size <= 0 || d.Path[0] != '/' || strings.ContainsAny(d.Export, "/\x00") {
					t.Errorf("accepted %+v", d)
				}
			}
		}
		var c check
		if decode(b, &c) == nil {
			_ = c.validate()
		}
		if err := peerReason(b); len(err.Error()) > 3*maxReason {
			t.Errorf("a reason of %d bytes reaches the operator", len(err.Error()))
		}
	})
}
