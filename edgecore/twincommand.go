package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/skerry-io/skerry/devicetwin"
	"github.com/skerry-io/skerry/devicetwin/api/v1alpha1"
	"github.com/skerry-io/skerry/edgecore/devices"
)

func newTwinCommand() *cobra.Command {
	var t twinClient
	c := &cobra.Command{
		Use:   "twin",
		Short: "See and set the devices of this node",
		Long: `See and set the devices of this node, with or without the cloud. A device is
named NAMESPACE/NAME, or NAME with -n; without either the namespace is default.

A value that is set here holds until its time ends (--ttl, else the model's),
or until it is given up (PROPERTY-); what the cloud wants is left as it is. The
property's model says whether that is allowed, and who wins when both change.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	f := c.PersistentFlags()
	f.StringVar(&t.dataDir, "data-dir", defaultDataDir, "directory of the node's state")
	f.StringVarP(&t.namespace, "namespace", "n", "", "namespace of the devices")
	f.StringVarP(&t.output, "output", "o", "", `"json" for scripts`)
	c.PersistentPreRunE = func(*cobra.Command, []string) error {
		if t.output != "" && t.output != "json" {
			return fmt.Errorf("output %q: only json is known", t.output)
		}
		return nil
	}
	c.AddCommand(t.listCommand(), t.getCommand(), t.setCommand(), t.watchCommand(), t.commandCommand(), t.refreshCommand())
	return c
}

// twinClient asks the running edgecore through its socket.
type twinClient struct{ dataDir, namespace, output string }

func (t *twinClient) listCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the devices of this node", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			path := "/v1/twins"
			if t.namespace != "" {
				path += "/" + url.PathEscape(t.namespace)
			}
			raw, err := t.ask(c.Context(), http.MethodGet, path, nil, nil)
			if err != nil || t.output == "json" {
				return t.print(c.OutOrStdout(), raw, err)
			}
			var list struct {
				Items []devicetwin.Doc `json:"items"`
			}
			if err := json.Unmarshal(raw, &list); err != nil {
				return fmt.Errorf("ask edgecore: %w", err)
			}
			if len(list.Items) == 0 {
				fmt.Fprintln(c.ErrOrStderr(), "no devices on this node")
				return nil
			}
			return printTwins(c.OutOrStdout(), list.Items)
		},
	}
}

func (t *twinClient) getCommand() *cobra.Command {
	return &cobra.Command{
		Use: "get DEVICE", Short: "Show one device", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			d, raw, err := t.get(c.Context(), args[0])
			if err != nil || t.output == "json" {
				return t.print(c.OutOrStdout(), raw, err)
			}
			return printTwin(c.OutOrStdout(), d)
		},
	}
}

func (t *twinClient) setCommand() *cobra.Command {
	var (
		ttl  time.Duration
		base string
	)
	c := &cobra.Command{
		Use:   "set DEVICE PROPERTY=VALUE… | PROPERTY-…",
		Short: "Set what is wanted of a device, or give that up (PROPERTY-)",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			d, _, err := t.get(c.Context(), args[0])
			if err != nil {
				return err
			}
			desired, err := assignments(args[1:], func(name string) (string, bool) {
				p, ok := d.Properties[name]
				return p.Type, ok
			}, "device "+d.Namespace+"/"+d.Name+" has no property", slices.Sorted(maps.Keys(d.Properties)))
			if err != nil {
				return err
			}
			body := map[string]any{"desired": desired}
			if ttl != 0 {
				body["ttl"] = ttl.String()
			}
			header := http.Header{}
			if base != "" {
				header.Set("If-Match", `"`+base+`"`)
			}
			raw, err := t.ask(c.Context(), http.MethodPatch, twinPath(d), body, header)
			if err != nil || t.output == "json" {
				return t.print(c.OutOrStdout(), raw, err)
			}
			var res devicetwin.Result
			if err := json.Unmarshal(raw, &res); err != nil {
				return fmt.Errorf("ask edgecore: %w", err)
			}
			fmt.Fprintf(c.OutOrStdout(), "%s/%s %s\n", d.Namespace, d.Name, res.State)
			return nil
		},
	}
	c.Flags().DurationVar(&ttl, "ttl", 0, "how long it holds; default: as the model says")
	c.Flags().StringVar(&base, "if-version", "", "only if nobody has changed the properties since this version")
	return c
}

func (t *twinClient) commandCommand() *cobra.Command {
	var (
		timeout time.Duration
		id      string
	)
	c := &cobra.Command{
		Use:   "command DEVICE COMMAND [ARGUMENT=VALUE…]",
		Short: "Have a device do something",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			path, err := t.path(args[0])
			if err != nil {
				return err
			}
			arguments, err := assignments(args[2:], nil, "", nil)
			if err != nil {
				return err
			}
			path += "/commands/" + url.PathEscape(args[1])
			if timeout != 0 {
				path += "?timeout=" + timeout.String()
			}
			raw, err := t.ask(c.Context(), http.MethodPost, path, map[string]any{"id": id, "args": arguments}, nil)
			if err != nil || t.output == "json" {
				return t.print(c.OutOrStdout(), raw, err)
			}
			var s devicetwin.CommandStatus
			if err := json.Unmarshal(raw, &s); err != nil {
				return fmt.Errorf("ask edgecore: %w", err)
			}
			fmt.Fprintln(c.OutOrStdout(), strings.TrimSpace(s.State+" "+string(s.Result)))
			return nil
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", 0, "how long to wait for the device; default: as the model says")
	c.Flags().StringVar(&id, "id", "", "the same id again does nothing again")
	return c
}

func (t *twinClient) refreshCommand() *cobra.Command {
	return &cobra.Command{
		Use: "refresh DEVICE", Short: "Ask a device for its values", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			path, err := t.path(args[0])
			if err != nil {
				return err
			}
			raw, err := t.ask(c.Context(), http.MethodPost, path+"/refresh", nil, nil)
			if err != nil || t.output == "json" {
				return t.print(c.OutOrStdout(), raw, err)
			}
			fmt.Fprintln(c.OutOrStdout(), "asked")
			return nil
		},
	}
}

func (t *twinClient) watchCommand() *cobra.Command {
	return &cobra.Command{
		Use: "watch [DEVICE]", Short: "Follow one device, or all", Args: cobra.MaximumNArgs(1),
		Long: `Follow one device, or all of a namespace (-n), or of the node: each value as it
is now, then every change. With -o json a line for each. It goes on over a
restart of edgecore.`,
		RunE: func(c *cobra.Command, args []string) error {
			path := "/v1/twins"
			if len(args) == 1 {
				p, err := t.path(args[0])
				if err != nil {
					return err
				}
				path = p
			} else if t.namespace != "" {
				path += "/" + url.PathEscape(t.namespace)
			}
			return t.watch(c.Context(), path, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
}

// assignments reads NAME=VALUE and NAME-. A value is JSON, or text: text it is
// in any case where that is what the type says.
func assignments(args []string, typeOf func(name string) (string, bool), unknown string, known []string) (map[string]json.RawMessage, error) {
	out := map[string]json.RawMessage{}
	for _, arg := range args {
		name, value, ok := strings.Cut(arg, "=")
		raw := json.RawMessage("null")
		switch {
		case ok:
			raw = json.RawMessage(value)
		case strings.HasSuffix(arg, "-") && typeOf != nil:
			name = strings.TrimSuffix(arg, "-")
		default:
			return nil, fmt.Errorf("%q is not NAME=VALUE", arg)
		}
		typ := ""
		if typeOf != nil {
			if typ, _ = typeOf(name); typ == "" {
				return nil, fmt.Errorf("%s %q; it has %s", unknown, name, strings.Join(known, ", "))
			}
		}
		if _, twice := out[name]; twice {
			return nil, fmt.Errorf("%s is given twice", name)
		}
		text := typ == v1alpha1.TypeString || typ == v1alpha1.TypeEnum || typ == v1alpha1.TypeBytes
		quoted := strings.HasPrefix(value, `"`)
		if ok && (text && !quoted || !json.Valid(raw)) {
			raw, _ = json.Marshal(value)
		}
		out[name] = raw
	}
	return out, nil
}

// path is the device's below edgecore's socket.
func (t *twinClient) path(device string) (string, error) {
	ns, name, ok := strings.Cut(device, "/")
	if !ok {
		ns, name = t.namespace, device
		if ns == "" {
			ns = "default"
		}
	} else if t.namespace != "" && t.namespace != ns {
		return "", fmt.Errorf("device %s and --namespace %s contradict each other", device, t.namespace)
	}
	if ns == "" || name == "" || strings.Contains(name, "/") {
		return "", fmt.Errorf("%q is not NAMESPACE/NAME", device)
	}
	return "/v1/twins/" + url.PathEscape(ns) + "/" + url.PathEscape(name), nil
}

func twinPath(d devicetwin.Doc) string {
	return "/v1/twins/" + url.PathEscape(d.Namespace) + "/" + url.PathEscape(d.Name)
}

func (t *twinClient) get(ctx context.Context, device string) (d devicetwin.Doc, raw []byte, err error) {
	path, err := t.path(device)
	if err != nil {
		return d, nil, err
	}
	if raw, err = t.ask(ctx, http.MethodGet, path, nil, nil); err != nil {
		return d, nil, err
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		return d, nil, fmt.Errorf("ask edgecore: %w", err)
	}
	return d, raw, nil
}

func (t *twinClient) print(w io.Writer, raw []byte, err error) error {
	if err != nil {
		return err
	}
	_, err = w.Write(raw)
	return err
}

const maxTwinAnswer = 64 << 20

// ask sends one request and returns the answer's body, or the error it tells.
func (t *twinClient) ask(ctx context.Context, method, path string, body any, header http.Header) ([]byte, error) {
	res, err := t.send(ctx, method, path, body, header)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxTwinAnswer))
	if err != nil {
		return nil, fmt.Errorf("ask edgecore: %w", err)
	}
	if res.StatusCode >= 300 {
		return nil, answerError(res.StatusCode, raw)
	}
	return raw, nil
}

func (t *twinClient) send(ctx context.Context, method, path string, body any, header http.Header) (*http.Response, error) {
	socket := filepath.Join(t.dataDir, adminSocket)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	var send io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		send = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://edgecore"+path, send)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, header)
	res, err := client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, &unreachableError{fmt.Errorf("ask edgecore at %s: %w; is it running? Start it with: systemctl start edgecore", socket, err)}
	}
	return res, nil
}

// answerError is what went wrong, in the daemon's words.
func answerError(code int, raw []byte) error {
	var told struct {
		Message string            `json:"message"`
		Props   map[string]string `json:"props"`
	}
	if err := json.Unmarshal(raw, &told); err != nil || told.Message == "" && len(told.Props) == 0 {
		return fmt.Errorf("edgecore answers %d %s", code, strings.TrimSpace(string(raw[:min(len(raw), 200)])))
	}
	words := []string{}
	if told.Message != "" {
		words = append(words, told.Message)
	}
	for _, name := range slices.Sorted(maps.Keys(told.Props)) {
		words = append(words, name+": "+told.Props[name])
	}
	return errors.New(strings.Join(words, "; "))
}

// watch prints changes until ctx ends.
func (t *twinClient) watch(ctx context.Context, path string, out, notes io.Writer) error {
	var (
		last string // version seen
		seen = map[string]devicetwin.Doc{}
		wait = time.Second
		met  bool
	)
	for {
		header := http.Header{"Accept": {"text/event-stream"}}
		if last != "" {
			header.Set("Last-Event-ID", last)
		}
		err := t.follow(ctx, path, header, func(id string, c devices.Event) error {
			met, wait = true, time.Second
			if id != "" {
				last = id
			}
			return t.show(out, c, seen)
		})
		var unreachable *unreachableError
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !(met && errors.As(err, &unreachable)):
			return err
		}
		fmt.Fprintln(notes, "edgecore is away; waiting for it")
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		wait = min(2*wait, 10*time.Second)
	}
}

// follow reads server-sent events.
func (t *twinClient) follow(ctx context.Context, path string, header http.Header, take func(id string, e devices.Event) error) error {
	res, err := t.send(ctx, http.MethodGet, path+"?watch=1", nil, header)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		raw, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
		if res.StatusCode == http.StatusServiceUnavailable && err == nil {
			return &unreachableError{answerError(res.StatusCode, raw)}
		}
		return errors.Join(answerError(res.StatusCode, raw), err)
	}
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, maxTwinAnswer)
	var id string
	var data []byte
	for lines.Scan() {
		field, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case field == "id":
			id = value
		case field == "data":
			data = append(data, value...)
		case lines.Text() == "" && len(data) > 0:
			var c devices.Event
			if err := json.Unmarshal(data, &c); err != nil {
				return fmt.Errorf("ask edgecore: %w", err)
			}
			if err := take(id, c); err != nil {
				return err
			}
			id, data = "", nil
		}
	}
	if err := lines.Err(); err != nil {
		return &unreachableError{fmt.Errorf("ask edgecore: %w", err)}
	}
	return nil
}

// show prints what a change changes.
func (t *twinClient) show(w io.Writer, c devices.Event, seen map[string]devicetwin.Doc) error {
	if t.output == "json" {
		return json.NewEncoder(w).Encode(c)
	}
	if c.Type == devicetwin.ChangeSynced {
		return nil
	}
	name := c.Namespace + "/" + c.Name
	at := time.Now().Format(time.TimeOnly)
	if c.Type == devicetwin.ChangeDelete {
		delete(seen, name)
		_, err := fmt.Fprintf(w, "%s %s deleted\n", at, name)
		return err
	}
	if c.Doc == nil {
		return nil
	}
	d := *c.Doc
	old, known := seen[name]
	seen[name] = d
	var b strings.Builder
	if !known || old.Phase != d.Phase {
		fmt.Fprintf(&b, "%s %s is %s\n", at, name, d.Phase)
	}
	for _, prop := range slices.Sorted(maps.Keys(d.Properties)) {
		p, was := d.Properties[prop], old.Properties[prop]
		if r := p.Reported; r != nil && (was.Reported == nil || !bytes.Equal(was.Reported.Value, r.Value) || was.Reported.Quality != r.Quality) {
			fmt.Fprintf(&b, "%s %s %s is %s%s\n", at, name, prop, r.Value, unlessGood(r.Quality))
		}
		if p.Want != nil && (!bytes.Equal(was.Want, p.Want) || was.State != p.State || was.By != p.By) {
			fmt.Fprintf(&b, "%s %s %s wanted %s by %s: %s\n", at, name, prop, p.Want, p.By, strings.TrimSpace(p.State+" "+p.Message))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func unlessGood(quality string) string {
	if quality == v1alpha1.QualityGood || quality == "" {
		return ""
	}
	return " (" + quality + ")"
}

func printTwins(w io.Writer, all []devicetwin.Doc) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "NAMESPACE\tNAME\tMODEL\tPHASE\tLAST SEEN\tVALUES")
	for _, d := range all {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", d.Namespace, d.Name, d.Model, d.Phase, seenAgo(d.LastSeen), values(d))
	}
	return tw.Flush()
}

func seenAgo(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return duration.HumanDuration(time.Since(*t))
}

// values are the first few of a device's.
func values(d devicetwin.Doc) string {
	const most = 4
	var out []string
	for _, name := range slices.Sorted(maps.Keys(d.Properties)) {
		p := d.Properties[name]
		if p.Reported == nil {
			continue
		}
		if len(out) == most {
			out = append(out, "…")
			break
		}
		out = append(out, name+"="+short(p.Reported.Value)+p.Unit+unlessGood(p.Reported.Quality))
	}
	if d.Problem != "" {
		out = append(out, "("+d.Problem+")")
	}
	return strings.Join(out, " ")
}

func short(raw json.RawMessage) string {
	const most = 40
	if len(raw) > most {
		return string(raw[:most]) + "…"
	}
	return string(raw)
}

func printTwin(w io.Writer, d devicetwin.Doc) error {
	fmt.Fprintf(w, "device    %s/%s, model %s\n", d.Namespace, d.Name, d.Model)
	fmt.Fprintf(w, "phase     %s, last seen %s\n", strings.TrimSpace(d.Phase+" "+parenthesis(d.Reason)), seenAgo(d.LastSeen))
	fmt.Fprintf(w, "version   %s, of generation %d\n", d.Version, d.Generation)
	if d.Problem != "" {
		fmt.Fprintf(w, "PROBLEM   %s\n", d.Problem)
	}
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "PROPERTY\tREPORTED\tQUALITY\tAGE\tWANTED\tBY\tSTATE")
	for _, name := range slices.Sorted(maps.Keys(d.Properties)) {
		p := d.Properties[name]
		reported, quality, age := "-", "-", "-"
		if r := p.Reported; r != nil {
			reported, quality, age = strings.TrimSpace(short(r.Value)+" "+p.Unit), r.Quality, duration.HumanDuration(time.Since(r.Received))
		}
		want, by, state := "-", "-", "-"
		if p.Want != nil {
			want, by, state = short(p.Want), p.By, p.State
			if o := p.Override; o != nil {
				by += " for " + duration.HumanDuration(time.Until(o.Expires))
			}
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", name, reported, quality, age, want, by, strings.TrimSpace(state+" "+parenthesis(p.Message)))
	}
	return tw.Flush()
}

func parenthesis(s string) string {
	if s == "" {
		return ""
	}
	return "(" + s + ")"
}
