package hypervisor

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/beevik/etree"
)

// Bounds on a document, whoever wrote it. maxXML is libvirt's own limit on a
// string; real domains stay below 2,000 elements and a depth of 12.
const (
	maxXML      = 4 << 20
	maxElements = 100_000
	maxDepth    = 64
)

// ErrBadXML is returned when a document is not one that this package will read:
// malformed, over its bounds, or not of the expected kind.
var ErrBadXML = errors.New("unusable XML")

// parseXML reads a document whose root must carry the given tag.
func parseXML(s, root string) (*etree.Document, error) {
	if err := checkBounds(s); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadXML, err)
	}
	doc := etree.NewDocument()
	doc.ReadSettings.PreserveCData = true
	// No encodings but UTF-8: what libvirt writes and all it reads over its socket.
	doc.ReadSettings.CharsetReader = func(label string, _ io.Reader) (io.Reader, error) {
		return nil, fmt.Errorf("encoding %q", label)
	}
	if err := doc.ReadFromString(s); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadXML, err)
	}
	if r := doc.Root(); r == nil || r.Space != "" || r.Tag != root {
		return nil, fmt.Errorf("%w: no <%s> document", ErrBadXML, root)
	}
	return doc, nil
}

// checkBounds reads the document once without building anything.
func checkBounds(s string) error {
	if len(s) > maxXML {
		return fmt.Errorf("%d bytes, more than %d", len(s), maxXML)
	}
	dec := xml.NewDecoder(strings.NewReader(s))
	roots, elements, depth := 0, 0, 0
	for {
		t, err := dec.RawToken()
		if errors.Is(err, io.EOF) {
			if depth != 0 || roots != 1 {
				return errors.New("incomplete, or more than one root")
			}
			return nil
		}
		if err != nil {
			return err
		}
		switch t.(type) {
		case xml.StartElement:
			if depth == 0 {
				roots++
			}
			depth++
			elements++
		case xml.EndElement:
			depth--
		case xml.Directive:
			return errors.New("a document type or another directive")
		}
		if depth > maxDepth || elements > maxElements {
			return fmt.Errorf("more than %d elements, or nested deeper than %d", maxElements, maxDepth)
		}
	}
}

// elements are e's children of this name. Like libvirt, and unlike etree, it
// takes none of another namespace for one of libvirt's own.
func elements(e *etree.Element, tag string) []*etree.Element {
	var list []*etree.Element
	if e != nil {
		for _, c := range e.ChildElements() {
			if c.Space == "" && c.Tag == tag {
				list = append(list, c)
			}
		}
	}
	return list
}

// child walks down the first elements of these names; nil when one is missing.
func child(e *etree.Element, path ...string) *etree.Element {
	for _, tag := range path {
		list := elements(e, tag)
		if len(list) == 0 {
			return nil
		}
		e = list[0]
	}
	return e
}

// text is the trimmed text of the element at path, or "".
func text(e *etree.Element, path ...string) string {
	if e = child(e, path...); e == nil {
		return ""
	}
	return strings.TrimSpace(e.Text())
}

// attr is the attribute of the element at path, or "".
func attr(e *etree.Element, name string, path ...string) string {
	if e = child(e, path...); e == nil {
		return ""
	}
	for _, a := range e.Attr {
		if a.Space == "" && a.Key == name {
			return a.Value
		}
	}
	return ""
}

// devices are the devices of one kind.
func devices(doc *etree.Document, tag string) []*etree.Element {
	var list []*etree.Element
	for _, d := range elements(doc.Root(), "devices") {
		list = append(list, elements(d, tag)...)
	}
	return list
}

// sizeUnits are libvirt's units of memory.
var sizeUnits = map[string]uint64{
	"": 1 << 10, "b": 1, "bytes": 1,
	"KB": 1e3, "k": 1 << 10, "KiB": 1 << 10,
	"MB": 1e6, "M": 1 << 20, "MiB": 1 << 20,
	"GB": 1e9, "G": 1 << 30, "GiB": 1 << 30,
	"TB": 1e12, "T": 1 << 40, "TiB": 1 << 40,
}

// memorySize reads an element such as <memory unit='KiB'>65536</memory>.
func memorySize(e *etree.Element) (uint64, error) {
	n, err := strconv.ParseUint(strings.TrimSpace(e.Text()), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("<%s>: %w", e.Tag, err)
	}
	unit, ok := sizeUnits[attr(e, "unit")]
	if !ok {
		return 0, fmt.Errorf("<%s>: unit %q", e.Tag, attr(e, "unit"))
	}
	if n > (1<<62)/unit {
		return 0, fmt.Errorf("<%s>: %d %s is out of range", e.Tag, n, attr(e, "unit"))
	}
	return n * unit, nil
}

// elementXML writes one element alone.
func elementXML(e *etree.Element) (string, error) {
	return etree.NewDocumentWithRoot(e.Copy()).WriteToString()
}
