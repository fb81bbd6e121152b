package main

import (
	"bytes"
	"os"
	"strings"
	"testing"
)

func TestMigrateCommand(t *testing.T) {
	run := func(in string, args ...string) (out, report string, err error) {
		c := newCommand()
		var stdout, stderr bytes.Buffer
		c.SetIn(strings.NewReader(in))
		c.SetOut(&stdout)
		c.SetErr(&stderr)
		c.SetArgs(append([]string{"migrate", "kubeedge"}, args...))
		err = c.ExecuteContext(t.Context())
		return stdout.String(), stderr.String(), err
	}
	data, err := os.ReadFile("migrate/testdata/modbus.in.yaml")
	if err != nil {
		t.Fatal(err)
	}
	out, report, err := run(string(data))
	if err != nil || !strings.Contains(out, "apiVersion: devices.skerry.dev/v1alpha1") || !strings.Contains(report, "1 models, 1 devices") {
		t.Errorf("%v; it writes:\n%s\nand reports:\n%s", err, out, report)
	}
	strictOut, _, err := run(string(data), "--strict")
	if err == nil || strictOut != out {
		t.Errorf("strict: %v; what it writes is the same: %t", err, strictOut == out)
	}
	for _, args := range [][]string{{"--cycle-unit", "h"}, {"--profile", "x"}} {
		if _, _, err := run(string(data), args...); err == nil {
			t.Errorf("%v was taken", args)
		}
	}
	if out, _, err := run("a: [b"); err == nil || out != "" {
		t.Errorf("what is no YAML: %v; it writes %q", err, out)
	}
}
