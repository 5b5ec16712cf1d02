package seed

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const (
	maxImages   = 1024     // every one costs a look-up for each page
	maxEntries  = 1 << 16  // of all folders together
	minFileSize = 64 << 10 // what is shorter is no image
	indexSuffix = ".index"
)

// errMany is returned when there are more files than are looked at.
var errMany = errors.New("too many files")

// Scan looks which images there are and forgets those that have gone, with their
// index files.
func (l *Library) Scan(ctx context.Context) {
	l.scanning.Lock()
	defer l.scanning.Unlock()
	now := map[string]found{} // by path
	seen := 0
	whole := true // everything listed was looked at
	for _, path := range l.listed {
		err := scanPath(ctx, path, now, &seen)
		if ctx.Err() != nil {
			return
		}
		whole = whole && (err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, errMany))
		l.complain(path, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for path, is := range now {
		if r := l.images[path]; r != nil {
			r.found = is
		} else {
			l.images[path] = &record{path: path, found: is}
		}
	}
	for path, r := range l.images {
		if _, there := now[path]; there || !whole {
			continue
		}
		delete(l.images, path)
		if r.index != nil {
			l.warn(r.index.release())
		}
	}
	if whole {
		l.forget()
	}
}

// complain notes what is wrong with a listed path, and logs what is new.
func (l *Library) complain(path string, err error) {
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if problem != "" && problem != l.lists[path] {
		l.log.Warn("seeds not looked through", "path", path, "error", err)
	}
	l.lists[path] = problem
}

// forget removes the index files of images that are not there. The mutex is held.
func (l *Library) forget() {
	keep := map[string]bool{}
	for path := range l.images {
		keep[indexName(path)] = true
	}
	entries, err := os.ReadDir(l.folder)
	l.warn(err)
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), indexSuffix) && !keep[e.Name()] {
			l.warn(os.Remove(filepath.Join(l.folder, e.Name())))
		}
	}
}

// found is an image's file.
type found struct {
	file   identity
	listed bool // by itself, not in a folder
	device bool // a block device
}

// scanPath finds the images of a listed path.
func scanPath(ctx context.Context, path string, into map[string]found, seen *int) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("look for seeds: %w", err)
	}
	if !info.IsDir() {
		f, id, err := openFile(path, true)
		if err != nil {
			return err
		}
		if len(into) < maxImages {
			into[path] = found{id, true, !info.Mode().IsRegular()}
		}
		return f.Close()
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return fmt.Errorf("look for seeds: %w", err)
	}
	return filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) { // it went while we looked
				return nil
			}
			return fmt.Errorf("look for seeds: %w", err)
		}
		if *seen++; *seen > maxEntries {
			return fmt.Errorf("%w: only the first %d are looked at", errMany, maxEntries)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		info, err := d.Info()
		if err != nil || info.Size() < minFileSize {
			return nil
		}
		id, err := identify(info, false)
		if err != nil {
			return nil
		}
		if _, there := into[path]; !there && len(into) == maxImages {
			return fmt.Errorf("%w: only the first %d images are indexed", errMany, maxImages)
		} else if !there {
			into[path] = found{file: id}
		}
		return nil
	})
}

// indexName is that of an image's index file.
func indexName(image string) string {
	sum := sha256.Sum256([]byte(image))
	return hex.EncodeToString(sum[:]) + indexSuffix
}
